"""Layout of one engine step: which rows are computed and which of them attend together.

Shapes: ``R`` decoding rows, ``M`` rows of all kinds, ``K`` key/value heads, ``W`` head size, ``L`` positions attended
to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from babydoctor.engine.kv_cache import KVCache

LENGTH_STEP = 32
"""Lengths are rounded up to a multiple of this, so that matrix products keep their shape for that many steps.
oneDNN builds a kernel for each new shape."""

CHUNK_STEP = 64
"""Like ``LENGTH_STEP``, for the rows and lengths of prompt chunks. Measured with the mini model and prompts of 160
different lengths: without rounding, kernels took 340 MiB more."""

QUERY_BLOCK = 128
"""Rows of a prompt chunk that attend together. Scores of keys that come after a block are not computed."""

CALL_POSITIONS = 512
"""Cost of the two products of one more attention call, in positions read (measured); see ``group_rows``."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Decoding rows ``first_row ..`` of neighboring slots ``first_slot ..``, attending to ``length`` positions."""

    first_row: int
    num_rows: int
    first_slot: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """Running requests that get one more token each. Lists are aligned and sorted by slot."""

    tokens: list[int]
    slots: list[int]
    positions: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A piece of a prompt: ``embeds`` ``[T, D]`` for positions ``start .. start + T`` of ``slot``.

    ``final``: the prompt ends here, so the logits of its last row are needed.
    """

    slot: int
    start: int
    embeds: torch.Tensor
    final: bool

    @property
    def end(self) -> int:
        return self.start + len(self.embeds)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkBlock:
    """Rows ``first_row .. first_row + num_rows`` of a chunk, which attend together to ``length`` positions.

    Every row sees the positions before ``masked_from``. ``mask`` ``[T, length - masked_from]`` is added to the scores
    of the others. ``T`` is ``num_rows`` rounded up: further rows are filler, which gives the products shapes that
    repeat.
    """

    first_row: int
    num_rows: int
    length: int
    masked_from: int
    mask: torch.Tensor

    def last_row(self) -> ChunkBlock:
        """The last row alone, without filler."""
        last = self.num_rows - 1
        return ChunkBlock(self.first_row + last, 1, self.length, self.masked_from, self.mask[last : last + 1])


@dataclass(frozen=True, slots=True, eq=False)
class StepLayout:
    """The tensors of one step that all layers share.

    Attributes:
        tokens: int64 ``[R]``, input token of each decoding row.
        positions: int64 ``[M]``, decoding rows first, then the chunks.
        write_index: int64 ``[R * K]``, where each decoding row's keys go in ``keys.view(-1, W)``.
        runs: groups of decoding rows that attend together.
        run_masks: ``[rows of the run, 1, 1, L]`` each.
        chunk_blocks: for each chunk, its rows in blocks that attend together.
        wanted: int64, the rows whose logits are needed; None: all of them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    write_index: torch.Tensor
    runs: list[RowGroup]
    run_masks: list[torch.Tensor]
    chunk_blocks: list[list[ChunkBlock]]
    wanted: torch.Tensor | None


class LayoutBuilder:
    """Builds the layout of each step over one KV cache."""

    def __init__(self, kv_cache: KVCache, window: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Keep what the steps share.

        Args:
            kv_cache: the slots that steps read and write.
            window: how many positions a row attends to, its own included; None: all up to its own.
            dtype: of the scores of prompt chunks.
        """
        self.kv_cache = kv_cache
        self.window = kv_cache.capacity if window is None else window
        self.device = kv_cache.device
        self._head_offsets = torch.arange(kv_cache.num_kv_heads, device=self.device) * kv_cache.capacity  # [K]
        self._slot_positions = torch.arange(kv_cache.capacity, device=self.device)  # [C]
        self._visible = torch.tensor(0.0, dtype=kv_cache.dtype, device=self.device)
        self._hidden = torch.tensor(float("-inf"), dtype=kv_cache.dtype, device=self.device)
        # Row r sees columns 0 .. r. Lengths are rounded up, so a block may have more columns than rows.
        widest = (QUERY_BLOCK, QUERY_BLOCK + CHUNK_STEP)
        self._triangle = torch.full(widest, float("-inf"), dtype=dtype, device=self.device).triu_(1)

    def group(self, rows: DecodeRows, chunks: Sequence[Chunk]) -> StepLayout:
        """Decide which rows attend together. A gap inside a run becomes a row that writes to the scratch slot."""
        filled: list[tuple[int, int, int]] = []
        kept: list[int] = []
        lengths = [position + 1 for position in rows.positions]
        runs = []
        for group in group_rows(rows.slots, lengths):
            first_row, first_slot = len(filled), rows.slots[group[0]]
            for index in group:
                while len(filled) - first_row < rows.slots[index] - first_slot:
                    filled.append((0, self.kv_cache.scratch, 0))
                kept.append(len(filled))
                filled.append((rows.tokens[index], rows.slots[index], rows.positions[index]))
            longest = round_up(max(lengths[index] for index in group), self.kv_cache.capacity)
            runs.append(RowGroup(first_row, len(filled) - first_row, first_slot, longest))
        return self.build(filled, runs, kept, chunks)

    def build(
        self, filled: Sequence[tuple[int, int, int]], runs: list[RowGroup], kept: Sequence[int], chunks: Sequence[Chunk]
    ) -> StepLayout:
        """The tensors of a step.

        Args:
            filled: token, slot and position of each decoding row.
            runs: cover all decoding rows in order.
            kept: decoding rows whose logits are needed.
            chunks: prompt chunks of the step.
        """
        # Where each row's key goes in keys.view(-1, W): slot, then head, then position.
        slot_size = self.kv_cache.num_kv_heads * self.kv_cache.capacity
        starts = [slot * slot_size + position for _, slot, position in filled]
        positions = [position for _, _, position in filled]
        wanted = list(kept)
        for chunk in chunks:
            positions.extend(range(chunk.start, chunk.end))
            if chunk.final:
                wanted.append(len(positions) - 1)
        row_tokens, row_starts, all_positions, all_wanted = self._to_device(
            [token for token, _, _ in filled], starts, positions, wanted
        )
        return StepLayout(
            tokens=row_tokens,
            positions=all_positions,
            write_index=(row_starts[:, None] + self._head_offsets).flatten(),
            runs=runs,
            run_masks=[self._run_mask(run, all_positions) for run in runs],
            chunk_blocks=[self._split_chunk(chunk) for chunk in chunks],
            wanted=None if len(wanted) == len(positions) else all_wanted,
        )

    def _to_device(self, *columns: list[int]) -> tuple[torch.Tensor, ...]:
        """An int64 tensor for each list. All are moved in one call, because each call takes about 10 µs."""
        together = torch.tensor([number for column in columns for number in column], dtype=torch.long)
        return together.to(self.device).split([len(column) for column in columns])

    def _run_mask(self, run: RowGroup, positions: torch.Tensor) -> torch.Tensor:
        """``[rows, 1, 1, L]``: 0 up to each row's own position, minus infinity after it and before the window."""
        reach = positions[run.first_row : run.first_row + run.num_rows, None]  # [rows, 1]
        seen = self._slot_positions[: run.length] <= reach  # [rows, L]
        if run.length > self.window:
            seen &= self._slot_positions[: run.length] > reach - self.window
        return torch.where(seen, self._visible, self._hidden)[:, None, None]

    def _split_chunk(self, chunk: Chunk) -> list[ChunkBlock]:
        """Split a chunk into blocks. No row sees the positions after it."""
        blocks = []
        for first_row in range(0, len(chunk.embeds), QUERY_BLOCK):
            num_rows = min(QUERY_BLOCK, len(chunk.embeds) - first_row)
            start = chunk.start + first_row
            length = round_up(start + num_rows, self.kv_cache.capacity, CHUNK_STEP)
            mask = self._triangle[: round_up(num_rows, QUERY_BLOCK, CHUNK_STEP), : length - start]
            if start + num_rows > self.window:
                mask = torch.cat((mask.new_zeros(len(mask), start), mask), dim=1)
                mask += torch.full_like(mask, float("-inf")).tril_(start - self.window)
                start = 0
            blocks.append(ChunkBlock(first_row, num_rows, length, start, mask))
        return blocks


def group_rows(slots: Sequence[int], lengths: Sequence[int], call_positions: int = CALL_POSITIONS) -> list[list[int]]:
    """Group rows so that one batched product over the slots that a group spans computes its attention.

    A group costs its longest length in every slot that it spans, gaps included, plus ``call_positions`` for the call.
    A row joins the previous group if that is cheaper than a separate call.

    Args:
        slots: sorted slot of each row.
        lengths: positions that each row attends to.

    Returns:
        Indices of rows, by group.
    """
    groups: list[list[int]] = []
    longest = 0
    for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        if groups:
            first, last = slots[groups[-1][0]], slots[groups[-1][-1]]
            joined = max(longest, length) * (slot - first + 1)
            apart = longest * (last - first + 1) + length + call_positions
            if joined <= apart:
                groups[-1].append(index)
                longest = max(longest, length)
                continue
        groups.append([index])
        longest = length
    return groups


def round_up(length: int, capacity: int, step: int = LENGTH_STEP) -> int:
    """``length`` rounded up to a multiple of ``step``, at most ``capacity``."""
    return min(-(-length // step) * step, capacity)
