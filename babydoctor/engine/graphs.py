"""Decoding steps as CUDA graphs: one launch per step instead of about forty per layer.

A graph has fixed shapes. So a step is padded to all running slots and to a rounded length, and rows of free slots
write to the scratch slot. One graph is captured for each rounded length when it is first needed. Steps with prompt
chunks are not captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from babydoctor.engine.decoder import Decoder
from babydoctor.engine.layout import DecodeRows, RowGroup, StepLayout

GRAPH_LENGTH_STEP = 256
"""Lengths are rounded up to a multiple of this: few graphs, little attention to masked positions."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedGraph:
    """A graph, the tensors that it reads and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    layout: StepLayout
    logits: torch.Tensor


class DecodeGraphs:
    """Captured decoding steps of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._graphs: dict[int, CapturedGraph] = {}

    def padded_layout(self, rows: DecodeRows) -> StepLayout:
        """A step over all running slots, with logits for every slot in order."""
        kv_cache = self.decoder.kv_cache
        filled = [(0, kv_cache.scratch, 0)] * kv_cache.max_running
        for token, slot, position in zip(rows.tokens, rows.slots, rows.positions, strict=True):
            filled[slot] = (token, slot, position)
        longest = max(rows.positions) + 1
        length = min(-(-longest // GRAPH_LENGTH_STEP) * GRAPH_LENGTH_STEP, kv_cache.capacity)
        run = RowGroup(0, kv_cache.max_running, 0, length)
        return self.decoder.layout.build(filled, [run], range(kv_cache.max_running), ())

    @torch.inference_mode()
    def forward(self, rows: DecodeRows) -> torch.Tensor:
        """Logits ``[R, vocabulary]`` of one decoding step."""
        layout = self.padded_layout(rows)
        length = layout.runs[0].length
        if length not in self._graphs:
            self._graphs[length] = self._capture(layout)
        captured = self._graphs[length]
        for target, source in zip(_inputs(captured.layout), _inputs(layout), strict=True):
            target.copy_(source)
        captured.graph.replay()
        return captured.logits[torch.tensor(rows.slots, device=captured.logits.device)]

    def _capture(self, layout: StepLayout) -> CapturedGraph:
        """Run the step a few times on a side stream, as CUDA requires, then capture it.

        Repeating it is safe: each run writes the same keys and values to the same positions.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.decoder.compute(layout, ())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.decoder.compute(layout, ())
        return CapturedGraph(graph, layout, logits)


def _inputs(layout: StepLayout) -> list[torch.Tensor]:
    return [layout.tokens, layout.positions, layout.write_index, *layout.run_masks]
