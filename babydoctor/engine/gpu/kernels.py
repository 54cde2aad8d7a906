"""Triton kernels of an engine step that read and write the KV cache's slots in place.

Shapes: ``M`` rows, ``D`` hidden size, ``H`` query heads, ``K`` key/value heads, ``G = H / K``, ``W`` head size, ``C``
positions of a slot, ``S`` slots.

All sizes that change from step to step are read from tensors, so a captured CUDA graph works for any of them. Products
accumulate in float32; float32 inputs are multiplied in float32 and not in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

QUERY_BLOCK = 64
"""Rows of a prompt chunk that one program computes."""

SMALLEST_DOT = 16
"""Triton's matrix product needs at least this many rows, columns and inner elements."""

FEW_ROWS, MANY_ROWS = 16, 4
"""Programs that share one row's keys. ``FEW_ROWS`` is used where rows and heads alone would not fill a GPU. There are
only two values, because each one is compiled as a separate kernel."""

FULL_GPU = 256
"""Rows times key/value heads that fill a GPU with ``MANY_ROWS`` programs each."""


@triton.jit
def _add_rms_norm(hidden, delta, weight, summed, normed, width, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(hidden + row + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        x = x + tl.load(delta + row + columns, mask=inside, other=0.0)
        tl.store(summed + row + columns, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(normed + row + columns, (wide * scale * gain.to(tl.float32)).to(x.dtype), mask=inside)


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``hidden + delta`` and its RMSNorm, both ``[M, D]``. Without ``delta`` the sum is ``hidden`` itself."""
    normed = torch.empty_like(hidden)
    summed = hidden if delta is None else torch.empty_like(hidden)
    width = hidden.shape[1]
    _add_rms_norm[(len(hidden),)](
        hidden, delta, weight, summed, normed, width, eps, delta is not None, triton.next_power_of_2(width)
    )
    return summed, normed


@triton.jit
def _swiglu(gate_up, output, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0)
    activated = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(output + row * width + columns, activated * up, mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``[M, 2 * I] -> [M, I]``: ``silu(gate) * up``."""
    num_rows, width = len(gate_up), gate_up.shape[1] // 2
    output = gate_up.new_empty(num_rows, width)
    _swiglu[(num_rows, triton.cdiv(width, 1024))](gate_up, output, width, 1024)
    return output


@triton.jit
def _rotate_and_store(
    projected, query, keys, values, cos, sin, positions, slots, slot_size, head_size, row_width, query_width,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(positions + row), tl.load(slots + row)
    columns = tl.arange(0, WIDTH)
    source = projected + row * row_width + head * WIDTH
    x = tl.load(source + columns)
    if head < NUM_HEADS + NUM_KV_HEADS:
        # rotate_half(x) = [-x2, x1]; the sign is in the table of sines.
        turned = tl.load(source + (columns + HALF) % WIDTH)
        table = position * WIDTH + columns
        x = (x * tl.load(cos + table) + turned * tl.load(sin + table)).to(x.dtype)
    if head < NUM_HEADS:
        tl.store(query + row * query_width + head * WIDTH + columns, x)
    elif head < NUM_HEADS + NUM_KV_HEADS:
        target = slot * slot_size + (head - NUM_HEADS) * head_size + position * WIDTH
        tl.store(keys + target + columns, x.to(keys.dtype.element_ty))
    else:
        target = slot * slot_size + (head - NUM_HEADS - NUM_KV_HEADS) * head_size + position * WIDTH
        tl.store(values + target + columns, x.to(values.dtype.element_ty))


def rotate_and_store(
    projected: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values to the slots.

    Args:
        projected: ``[M, (H + 2 * K) * W]``, query, key and value of each row.
        keys, values: ``[S, K, C, W]``; written.
        cos, sin: ``[C, W]``; ``sin`` carries the sign of ``rotate_half``.
        positions, slots: int64 ``[M]``, where each row's key and value go.

    Returns:
        The rotated queries ``[M, H, W]``.
    """
    num_rows, row_width = projected.shape
    _, num_kv_heads, capacity, width = keys.shape
    query = projected.new_empty(num_rows, num_heads, width)
    _rotate_and_store[(num_rows, num_heads + 2 * num_kv_heads)](
        projected, query, keys, values, cos, sin, positions, slots, num_kv_heads * capacity * width, capacity * width,
        row_width, num_heads * width, num_heads, num_kv_heads, width // 2, width, num_warps=1,
    )  # fmt: skip
    return query


@triton.jit
def _attend_block(q, keys, values, where, inside, visible, scale, maximum, total, mixed):
    """Add one block of keys to an online softmax with running ``maximum``, ``total`` and weighted values ``mixed``.

    ``where`` ``[BLOCK, WIDTH]`` holds offsets of keys and values, ``inside`` ``[BLOCK]`` says which to load, and
    ``visible`` ``[rows or 1, BLOCK]`` which keys each row of ``q`` sees.
    """
    k = tl.load(keys + where, mask=inside[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp(scores - highest[:, None])
    shrink = tl.exp(maximum - highest)
    v = tl.load(values + where, mask=inside[:, None], other=0.0)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return highest, total * shrink + tl.sum(weights, axis=1), mixed


@triton.jit
def _attend_decoding(
    query, keys, values, positions, slots, partial, maxima, sums, slot_size, head_size, scale,
    NUM_HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The ``G`` query heads of one key/value head against one share of the row's keys."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + row) + 1
    base = tl.load(slots + row) * slot_size + kv_head * head_size
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    first = split * share
    last = tl.minimum(first + share, length)
    groups, columns, block = tl.arange(0, PADDED), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    heads = kv_head * GROUPS + groups
    is_head = groups < GROUPS
    q = tl.load(query + (row * NUM_HEADS + heads)[:, None] * WIDTH + columns[None], mask=is_head[:, None], other=0.0)
    q = q.to(keys.dtype.element_ty)
    maximum = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mixed = tl.zeros([PADDED, WIDTH], tl.float32)
    for start in range(first, last, BLOCK):
        position = start + block
        where = base + position[:, None] * WIDTH + columns[None]
        inside = position < last
        maximum, total, mixed = _attend_block(
            q, keys, values, where, inside, inside[None], scale, maximum, total, mixed
        )
    place = (row * NUM_HEADS + heads) * SPLITS + split
    tl.store(partial + place[:, None] * WIDTH + columns[None], mixed, mask=is_head[:, None])
    tl.store(maxima + place, maximum, mask=is_head)
    tl.store(sums + place, total, mask=is_head)


@triton.jit
def _combine_splits(partial, maxima, sums, output, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    row_head = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    place = row_head * SPLITS + splits
    maximum = tl.load(maxima + place)
    weight = tl.exp(maximum - tl.max(maximum, axis=0))  # 0 for a share without keys
    mixed = tl.load(partial + place[:, None] * WIDTH + columns[None])
    total = tl.sum(weight * tl.load(sums + place), axis=0)
    result = tl.sum(mixed * weight[:, None], axis=0) / total
    tl.store(output + row_head * WIDTH + columns, result.to(output.dtype.element_ty))


def attend_decoding(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Attention of decoding rows, each over its slot's positions up to its own.

    A row's keys are divided among several programs whose results are then combined (flash-decoding, Dao et al. 2023).

    Args:
        query: ``[M, H, W]``.
        keys, values: ``[S, K, C, W]``.
        positions, slots: int64 ``[M]``.
        output: ``[M, H * W]``; written.
    """
    num_rows, num_heads, width = query.shape
    _, num_kv_heads, capacity, _ = keys.shape
    groups = num_heads // num_kv_heads
    splits = FEW_ROWS if num_rows * num_kv_heads < FULL_GPU else MANY_ROWS
    partial = torch.empty(num_rows, num_heads, splits, width, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, num_rows, num_heads, splits, dtype=torch.float32, device=query.device)
    _attend_decoding[(num_rows, num_kv_heads, splits)](
        query, keys, values, positions, slots, partial, maxima, sums, num_kv_heads * capacity * width,
        capacity * width, scale, num_heads, groups, max(SMALLEST_DOT, triton.next_power_of_2(groups)), width, splits,
        _key_block(keys),
    )  # fmt: skip
    _combine_splits[(num_rows * num_heads,)](partial, maxima, sums, output, width, splits)


@triton.jit
def _attend_chunks(
    query, keys, values, blocks, output, slot_size, head_size, scale,
    NUM_HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of query rows of one chunk, for one head."""
    index, head = tl.program_id(0), tl.program_id(1)
    first_row, num_rows = tl.load(blocks + index * 4), tl.load(blocks + index * 4 + 1)
    slot, first_position = tl.load(blocks + index * 4 + 2), tl.load(blocks + index * 4 + 3)
    base = slot * slot_size + (head // GROUPS) * head_size
    rows, columns, block = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    is_row = rows < num_rows
    place = ((first_row + rows) * NUM_HEADS + head)[:, None] * WIDTH + columns[None]
    q = tl.load(query + place, mask=is_row[:, None], other=0.0).to(keys.dtype.element_ty)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    length = first_position + num_rows
    for start in range(0, length, BLOCK):
        position = start + block
        where = base + position[:, None] * WIDTH + columns[None]
        visible = position[None] <= (first_position + rows)[:, None]
        maximum, total, mixed = _attend_block(
            q, keys, values, where, position < length, visible, scale, maximum, total, mixed
        )
    tl.store(output + place, (mixed / total[:, None]).to(output.dtype.element_ty), mask=is_row[:, None])


def attend_chunks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Causal attention of prompt chunks over their slots, which already hold the chunks' own keys and values.

    Args:
        query: ``[M, H, W]``, all rows of the step.
        keys, values: ``[S, K, C, W]``.
        blocks: int64 ``[B, 4]``: first row, number of rows (at most ``QUERY_BLOCK``), slot and first position.
        output: ``[M, H * W]``; the rows of the blocks are written.
    """
    _, num_heads, width = query.shape
    _, num_kv_heads, capacity, _ = keys.shape
    _attend_chunks[(len(blocks), num_heads)](
        query, keys, values, blocks, output, num_kv_heads * capacity * width, capacity * width, scale,
        num_heads, num_heads // num_kv_heads, width, QUERY_BLOCK, _key_block(keys),
    )  # fmt: skip


def _key_block(keys: torch.Tensor) -> int:
    """Keys that a program loads at a time. Larger float32 blocks and the queries exceed an A10's shared memory."""
    return 64 if keys.element_size() == 2 else 16
