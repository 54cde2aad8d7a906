"""Decoding steps as CUDA graphs: one launch instead of some forty for every layer.

A graph has fixed shapes, so a step is padded to all running slots and to a rounded length; rows of free slots write to
the scratch slot. One graph is recorded for each rounded length when it is first needed. Steps that read prompts are
not recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from babydoctor.engine.decoder import Decoder, DecodeRows, Run, StepPlan

GRAPH_LENGTH_STEP = 256
"""Lengths are rounded up to a multiple of this: few graphs, little attention to nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A graph, the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    plan: StepPlan
    logits: torch.Tensor


class DecodeGraphs:
    """Recorded decoding steps of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._recordings: dict[int, Recording] = {}

    def padded_plan(self, rows: DecodeRows) -> StepPlan:
        """A step over all running slots, whichever of them ``rows`` are. Logits come for every slot, in order."""
        memory = self.decoder.memory
        filled = [(0, memory.scratch, 0)] * memory.max_running
        for token, slot, position in zip(rows.tokens, rows.slots, rows.positions, strict=True):
            filled[slot] = (token, slot, position)
        longest = max(rows.positions) + 1
        length = min(-(-longest // GRAPH_LENGTH_STEP) * GRAPH_LENGTH_STEP, memory.capacity)
        run = Run(0, memory.max_running, 0, length)
        return self.decoder.build_plan(filled, [run], range(memory.max_running), ())

    @torch.inference_mode()
    def forward(self, rows: DecodeRows) -> torch.Tensor:
        """Logits ``[R, vocabulary]`` of one decoding step."""
        plan = self.padded_plan(rows)
        length = plan.runs[0].length
        if length not in self._recordings:
            self._recordings[length] = self._record(plan)
        recording = self._recordings[length]
        for target, source in zip(_inputs(recording.plan), _inputs(plan), strict=True):
            target.copy_(source)
        recording.graph.replay()
        return recording.logits[torch.tensor(rows.slots, device=recording.logits.device)]

    def _record(self, plan: StepPlan) -> Recording:
        """Run the step a few times on a side stream, as CUDA asks, then record it. It may be repeated: each run writes
        the same keys and values to the same places."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.decoder.compute(plan, ())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.decoder.compute(plan, ())
        return Recording(graph, plan, logits)


def _inputs(plan: StepPlan) -> list[torch.Tensor]:
    return [plan.tokens, plan.positions, plan.write_index, *plan.run_masks]
