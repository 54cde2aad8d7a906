"""An engine step on a GPU: eleven kernel launches per layer, or one graph launch for a step without prompt chunks.

Shapes as in ``engine/decoder.py``: ``R`` decoding rows, ``M`` rows of all kinds, ``D`` hidden size, ``H`` query heads,
``W`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from babydoctor.engine.decoder import Decoder, has_head_norms
from babydoctor.engine.gpu import kernels
from babydoctor.engine.kv_cache import KVCache
from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.model.families import LanguageModel, sliding_window

CHECKED_POSITIONS = 8
LARGEST_DIFFERENCE = 0.1
"""Relative difference of logits that ``check`` allows. Rounding to bfloat16 causes 0.01 over 32 layers."""


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """The inputs of a step, on the device.

    Attributes:
        tokens: int64 ``[R]``, input token of each decoding row.
        positions, slots: int64 ``[M]``, decoding rows first, then the chunks.
        blocks: int64 ``[B, 4]``, the chunks' rows in blocks; see ``kernels.attend_chunks``. None: no chunks.
        wanted: int64, the rows whose logits are needed. None: all of them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    blocks: torch.Tensor | None = None
    wanted: torch.Tensor | None = None


class GpuDecoder(Decoder):
    """A language model whose attention reads the KV cache's slots in place, by Triton kernels."""

    def __init__(self, model: LanguageModel, kv_cache: KVCache, *, own: bool = False) -> None:
        super().__init__(model, kv_cache, pack=False, own=own)
        self._graphs: DecodeGraphs | None = None
        # The kernels rotate in the model's precision, so the tables have its dtype.
        self._cos, self._sin = (table[:, 0].to(self.dtype).contiguous() for table in (self.cos, self.sin))  # [C, W]

    def capture_graphs(self) -> None:
        """Capture decoding steps as CUDA graphs, which ``forward`` then replays."""
        self._graphs = DecodeGraphs(self)
        self.has_graphs = True

    @torch.inference_mode()
    def check(self) -> None:
        """Compute a prompt and a decoding step with the kernels and with PyTorch's operations, and compare the logits.

        Raises:
            RuntimeError: the kernels do not run here, or their logits differ.
        """
        embeds = self.embed_tokens(torch.arange(CHECKED_POSITIONS, device=self.device))
        steps: list[tuple[DecodeRows, list[Chunk]]] = [
            (DecodeRows([], [], []), [Chunk(0, 0, embeds, True)]),
            (DecodeRows([1], [0], [CHECKED_POSITIONS]), []),
        ]
        for rows, chunks in steps:
            expected = self.compute(self.layout.group(rows, chunks), chunks).float()
            difference = (self.forward(rows, chunks).float() - expected).norm() / expected.norm()
            if not float(difference) < LARGEST_DIFFERENCE:
                raise RuntimeError(f"the kernels' logits differ by {float(difference):.1%}")

    @torch.inference_mode()
    def forward(self, rows: DecodeRows, chunks: Sequence[Chunk]) -> torch.Tensor:
        if self._graphs is not None and not chunks:
            return self._graphs.forward(rows)
        return self.compute_step(self.build_step(rows, chunks), [chunk.embeds for chunk in chunks])

    def build_step(self, rows: DecodeRows, chunks: Sequence[Chunk]) -> StepTensors:
        """The step's tensors, moved to the device in one copy."""
        positions, slots, blocks = list(rows.positions), list(rows.slots), []
        wanted = list(range(len(positions)))
        for chunk in chunks:
            for start in range(chunk.start, chunk.end, kernels.QUERY_BLOCK):
                length = min(kernels.QUERY_BLOCK, chunk.end - start)
                blocks += [len(positions) + start - chunk.start, length, chunk.slot, start]
            positions += range(chunk.start, chunk.end)
            slots += [chunk.slot] * (chunk.end - chunk.start)
            if chunk.final:
                wanted.append(len(positions) - 1)
        columns = (rows.tokens, positions, slots, blocks, wanted)
        together = torch.tensor([number for column in columns for number in column], dtype=torch.long)
        parts = together.to(self.device).split([len(column) for column in columns])
        is_all = len(wanted) == len(positions)
        blocks_or_none = parts[3].view(-1, 4) if chunks else None
        return StepTensors(parts[0], parts[1], parts[2], blocks_or_none, None if is_all else parts[4])

    def compute_step(self, step: StepTensors, embeds: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Logits ``[wanted rows, vocabulary]``. Without chunks all inputs are tensors, so the step can be captured.

        Args:
            step: the rows.
            embeds: ``[T, D]`` of each chunk.
        """
        hidden = self.embed_tokens(step.tokens)
        if embeds:
            hidden = torch.cat([hidden, *embeds])
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            hidden, normed = kernels.add_rms_norm(hidden, delta, layer.input_norm, self.eps)
            attended = self._attend(index, layer.query_key_value(normed), step)
            if index == len(self.layers) - 1 and step.wanted is not None:
                hidden, attended = hidden[step.wanted], attended[step.wanted]
            hidden, normed = kernels.add_rms_norm(hidden, layer.output(attended), layer.post_norm, self.eps)
            delta = layer.down(kernels.swiglu(layer.gate_up(normed)))
        return self.lm_head(kernels.add_rms_norm(hidden, delta, self.final_norm, self.eps)[1])

    def _attend(self, index: int, projected: torch.Tensor, step: StepTensors) -> torch.Tensor:
        """Write keys and values to the slots and attend: ``[M, (H + 2 * K) * W] -> [M, H * W]``."""
        keys, values = self.kv_cache.keys[index], self.kv_cache.values[index]
        query = kernels.rotate_and_store(
            projected, keys, values, self._cos, self._sin, step.positions, step.slots, self.num_heads
        )
        attended = projected.new_empty(len(projected), self.num_heads * self.head_dim)
        num_rows = len(step.tokens)
        if num_rows:
            decoding = (step.positions[:num_rows], step.slots[:num_rows])
            kernels.attend_decoding(query[:num_rows], keys, values, *decoding, self.scale, attended[:num_rows])
        if step.blocks is not None:
            kernels.attend_chunks(query, keys, values, step.blocks, self.scale, attended)
        return attended


@dataclass(frozen=True, slots=True, eq=False)
class CapturedStep:
    """A graph, the numbers ``[3, R]`` that it reads (tokens, positions, slots) and the logits that it writes."""

    graph: torch.cuda.CUDAGraph
    numbers: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """CUDA graphs of one decoder's decoding steps. A graph replaces all kernel launches of a step by one.

    A graph has a fixed number of rows. One is captured for each power of two up to ``max_running``, and a step uses the
    smallest that holds its rows. Padding rows write to the scratch slot. The kernels read the requests' lengths from
    tensors, so a graph works for all lengths.
    """

    def __init__(self, decoder: GpuDecoder) -> None:
        self._scratch = decoder.kv_cache.scratch
        self._steps: dict[int, CapturedStep] = {}
        pool = torch.cuda.graph_pool_handle()
        # Capture the largest first: the smaller ones then reuse its memory.
        for num_rows in reversed(row_buckets(decoder.kv_cache.max_running)):
            self._steps[num_rows] = _capture(decoder, num_rows, pool)

    def forward(self, rows: DecodeRows) -> torch.Tensor:
        """Logits ``[R, vocabulary]`` of one decoding step; the next step overwrites them."""
        num_rows = len(rows.tokens)
        captured = self._steps[min(size for size in self._steps if size >= num_rows)]
        captured.numbers.copy_(pad_rows(rows, captured.numbers.shape[1], self._scratch))
        captured.graph.replay()
        return captured.logits[:num_rows]


def row_buckets(max_running: int) -> list[int]:
    """Numbers of rows of the captured steps: the powers of two below ``max_running``, and itself."""
    return [2**power for power in range((max_running - 1).bit_length())] + [max_running]


def pad_rows(rows: DecodeRows, num_rows: int, scratch: int) -> torch.Tensor:
    """Tokens, positions and slots ``[3, num_rows]``; padding rows are at the scratch slot's first position."""
    missing = num_rows - len(rows.tokens)
    columns = (rows.tokens + [0] * missing, rows.positions + [0] * missing, rows.slots + [scratch] * missing)
    return torch.tensor(columns, dtype=torch.long)


@torch.inference_mode()
def _capture(decoder: GpuDecoder, num_rows: int, pool: Any) -> CapturedStep:
    """Run the step on a side stream, as CUDA requires, then capture it. All rows write to the scratch slot."""
    numbers = pad_rows(DecodeRows([], [], []), num_rows, decoder.kv_cache.scratch).to(decoder.device)
    step = StepTensors(*numbers.unbind())
    stream = torch.cuda.Stream(decoder.device)
    stream.wait_stream(torch.cuda.current_stream(decoder.device))
    with torch.cuda.stream(stream):
        decoder.compute_step(step)
    torch.cuda.current_stream(decoder.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may use CUDA during the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits = decoder.compute_step(step)
    return CapturedStep(graph, numbers, logits)


def kernels_fit(kv_cache: KVCache) -> bool:
    """True if the kernels support this head size."""
    return kv_cache.head_dim >= kernels.SMALLEST_DOT and kv_cache.head_dim.bit_count() == 1


def check_kernels(model: LanguageModel, kv_cache: KVCache) -> None:
    """Refuse a model that the kernels cannot compute.

    Raises:
        RuntimeError: there are no kernels for its heads, their norms or its sliding window.
    """
    if not kernels_fit(kv_cache):
        raise RuntimeError(f"there are no kernels for heads of size {kv_cache.head_dim}")
    if has_head_norms(model):
        raise RuntimeError("there are no kernels for Qwen3's norms of queries and keys")
    window = sliding_window(model.config)
    if window is not None and window < kv_cache.capacity:
        raise RuntimeError(
            f"there are no kernels for a sliding window of {window} tokens; engine.max_context={window} needs none"
        )
