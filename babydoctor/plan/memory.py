"""Bytes of a training step, tensor by tensor. Arithmetic only.

The formulas follow ``model/packed/`` line by line, and ``tests/test_planner.py`` compares them with the bytes that
training actually allocates. If those modules keep other tensors for the backward pass, this file must change too.

Symbols: ``T`` tokens of the micro-batch, ``Q`` tokens from each document's first target on (all that the last layer
computes besides keys and values), ``W`` hidden size, ``I`` intermediate size, ``r`` LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from babydoctor.model.packed.attention import QUERY_BLOCK
from babydoctor.model.packed.loss import chunk_rows
from babydoctor.plan.costs import FLOAT32, ONLY_TAIL, Architecture, Work

ALLOWANCE = "(allowance)"
"""Ends the name of each part of memory that torch's allocator does not show."""

CUDA_CONTEXT_BYTES = 800 * 2**20
"""Allowance for CUDA's context, its libraries' code and cuBLAS's workspaces."""

FRAGMENTATION = 0.04
"""Allowance for memory that the CUDA allocator holds and cannot use, as a share of all tensors."""

CPU_PROCESS_BYTES = 2**30
"""Allowance for what a process on the CPU holds besides tensors: 0.4 GiB for Python, torch and transformers, the rest
for compiled kernels, oneDNN's packed operands and freed memory that the C library keeps. Measured with two layers at
7B's sizes: 0.8 to 1.0 GiB in all three stages."""

LINEAR_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that read the same input and share its dropout mask."""


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment of a step, without weights and optimizer state."""

    activations: float
    """Kept for the backward pass."""
    working: float
    """Temporary tensors of the operation that runs, and the layer that is recomputed."""
    gradients: float

    @property
    def total(self) -> float:
        return self.activations + self.working + self.gradients


def peak_moment(shape: Architecture, work: Work, recompute_every: int, *, accumulates: bool, is_cuda: bool) -> Moment:
    """The moment of a step at which it needs the most memory.

    Args:
        accumulates: True for a step of several micro-batches: from the second one on, all gradients exist from the
            beginning. In a step of one micro-batch they appear layer by layer, while activations are freed.
    """
    moments = step_moments(shape, work, recompute_every, accumulates=accumulates, is_cuda=is_cuda)
    return max(moments, key=lambda moment: moment.total)


def step_moments(
    shape: Architecture, work: Work, recompute_every: int, *, accumulates: bool, is_cuda: bool
) -> Iterator[Moment]:
    """The moments of a step that can be its peak: the loss, and the backward pass of each layer."""
    layers = []
    for index in range(shape.num_layers):
        is_last = index == shape.num_layers - 1
        saved = layer_saved_bytes(shape, work, is_last=is_last, is_cuda=is_cuda)
        layers.append((is_last, saved, bool(recompute_every) and index % recompute_every == 0))
    inputs = shape.num_layers * layer_input_bytes(shape, work)
    kept = shared_activation_bytes(shape, work) + inputs
    kept += sum(saved for _, saved, is_recomputed in layers if not is_recomputed)
    in_layer = FLOAT32 * shape.lora_parameters_per_layer
    gradients = FLOAT32 * shape.trainable if accumulates else 0.0
    yield Moment(kept, loss_bytes(shape, work, is_cuda=is_cuda), gradients)
    for is_last, saved, is_recomputed in reversed(layers):
        if is_recomputed:
            working = recomputed_layer_bytes(shape, work, saved, is_last=is_last, is_cuda=is_cuda)
        else:
            working = backward_bytes(shape, work, is_last=is_last)
        yield Moment(kept, working, gradients)
        kept -= layer_input_bytes(shape, work) + (0 if is_recomputed else saved)
        gradients += 0 if accumulates else in_layer
    yield Moment(0.0, 0.0, FLOAT32 * shape.trainable)  # the optimizer's step


def layer_input_bytes(shape: Architecture, work: Work) -> float:
    """``[T, W]``: the only tensor kept of a layer that is recomputed."""
    return work.num_tokens * shape.hidden_size * shape.dtype_bytes


def layer_saved_bytes(shape: Architecture, work: Work, *, is_last: bool, is_cuda: bool) -> float:
    """What autograd keeps of one decoder layer besides its input."""
    b, t, w, heads = shape.dtype_bytes, work.num_tokens, shape.hidden_size, shape.query_size
    q = work.num_tail if is_last else t
    total: float = (t + q) * FLOAT32  # inverse RMS of the two norms
    total += (q + 2 * t) * heads * b  # rotated queries and keys, values; grouped keys and values are repeated
    if shape.has_head_norms:  # queries and keys before their norms, and the inverse RMS of each head
        num_kv_heads = shape.kv_size // shape.head_dim
        total += (q * heads + t * shape.kv_size) * b + (q * shape.num_heads + t * num_kv_heads) * FLOAT32
    if is_cuda:
        total += q * (heads * b + shape.num_heads * FLOAT32)  # attention's result and its log-sum-exp
        total += 2 * work.num_prefix * work.num_documents * heads * b  # the prefix's keys and values for each document
    else:
        total += attention_scores(work, is_last=is_last) * shape.num_heads * b  # probabilities
    total += q * w * b  # the residual stream between attention and feed-forward
    total += 2 * q * shape.intermediate_size * b  # gate and up
    return total + sum(lora_saved_bytes(shape, work, is_last=is_last, is_cuda=is_cuda).values())


def lora_saved_bytes(shape: Architecture, work: Work, *, is_last: bool, is_cuda: bool) -> dict[str, float]:
    """What the LoRA of one layer keeps, by linear: inputs after dropout, dropout masks and low-rank products."""
    if not shape.lora_rank:
        return {}
    b = shape.dtype_bytes
    groups: list[tuple[str, ...]] = list(LINEAR_GROUPS)
    if is_last:
        groups[0:1] = [("k_proj", "v_proj"), ("q_proj",)]
    saved: dict[str, float] = {}
    for group in groups:
        members = [name for name in group if name in shape.lora_modules]
        if not members:
            continue
        rows = work.num_tail if is_last and group[0] in ONLY_TAIL else work.num_tokens
        in_size = shape.linears()[group[0]][0]
        # Without dropout this is the input itself, and attention on CUDA keeps its result anyway.
        is_kept_anyway = not shape.lora_dropout and is_cuda and group == ("o_proj",)
        total: float = 0 if is_kept_anyway else rows * in_size * b
        total += rows * in_size if shape.lora_dropout else 0  # the mask, one byte per element
        saved[group[0]] = total + rows * shape.lora_rank * b * len(members)
    return saved


def recomputed_layer_bytes(shape: Architecture, work: Work, saved: float, *, is_last: bool, is_cuda: bool) -> float:
    """Temporary bytes of a layer that is recomputed: the tensors it saves, and the peak of all others.

    That peak is either at the end of the recomputation, when the forward function still holds its local variables, or
    in the backward pass that follows.
    """
    b, t, w = shape.dtype_bytes, work.num_tokens, shape.hidden_size
    rows = work.num_tail if is_last else t
    has_down = "down_proj" in shape.lora_modules and bool(shape.lora_rank)
    gradient = rows * w * b  # of the layer's output
    local: float = rows * w * b  # the second norm's result
    # Attention's result, and values before they were laid out by head.
    local += 0 if is_cuda else (rows + t) * shape.query_size * b
    local += rows * shape.intermediate_size * b  # silu(gate) * up
    if has_down:  # down_proj runs to save its LoRA's tensors; otherwise recomputation stops before it
        local += rows * w * b + _dequantized_bytes(shape)
    forward = gradient + local
    return saved + max(forward, backward_bytes(shape, work, is_last=is_last))


def backward_bytes(shape: Architecture, work: Work, *, is_last: bool) -> float:
    """Peak of temporary bytes in the backward pass of one layer, besides saved tensors.

    - In ``down_proj``: the gradient of the residual stream, the input's gradient and its part through the LoRA; or
      the dequantized weight instead of the latter.
    - In ``silu(gate) * up``: the gradients of the residual stream, of the product, of gate and of up. What the LoRA
      of ``down_proj`` saved is free by then.
    """
    b = shape.dtype_bytes
    rows = work.num_tail if is_last else work.num_tokens
    inner = rows * shape.intermediate_size * b
    has_down = "down_proj" in shape.lora_modules and bool(shape.lora_rank)
    freed = lora_saved_bytes(shape, work, is_last=is_last, is_cuda=False).get("down_proj", 0.0)
    in_down = inner + max(inner if has_down else 0, _dequantized_bytes(shape))
    return rows * shape.hidden_size * b + max(in_down, 3 * inner - freed)


def _dequantized_bytes(shape: Architecture) -> float:
    """The largest weight of a layer in float, while a 4-bit linear uses it."""
    return shape.hidden_size * shape.intermediate_size * shape.dtype_bytes if shape.is_4bit else 0


def shared_activation_bytes(shape: Architecture, work: Work) -> float:
    """What is kept outside the layers: projector, images, rotary tables, final norm, gradient of the loss."""
    b, w, patches = shape.dtype_bytes, shape.hidden_size, work.num_images * shape.num_patches
    total: float = work.num_tokens * 2 * shape.head_dim * b  # cos and sin
    total += work.num_tail * (w * b + FLOAT32)  # the last layer's output and its inverse RMS
    total += work.num_supervised * w * b  # gradient at the loss positions, made in the forward pass
    total += work.num_images * 3 * shape.image_size**2 * FLOAT32
    total += work.num_tokens * 3 * 8  # input_ids, targets and position_ids as int64
    if shape.trains_projector:
        total += patches * shape.vision_hidden_size * b + shape.projector_parameters * b
    return total


def loss_bytes(shape: Architecture, work: Work, *, is_cuda: bool) -> float:
    """Logits of one chunk, in the model's dtype and twice in float32, and the hidden states at the loss positions."""
    rows = min(work.num_supervised, chunk_rows(shape.vocab_size, is_cuda=is_cuda))
    hidden = work.num_supervised * shape.hidden_size * shape.dtype_bytes
    return rows * shape.vocab_size * (shape.dtype_bytes + 2 * FLOAT32) + hidden


def attention_scores(work: Work, *, is_last: bool) -> float:
    """Query-key pairs that the CPU's blocks compute, for one head."""
    own = round(work.own_length)
    num_queries = min(own, round(work.num_tail / max(1.0, work.num_documents))) if is_last else own
    pairs = _block_pairs(num_queries, work.num_prefix + own) * work.num_documents
    return pairs if is_last else pairs + _block_pairs(work.num_prefix, work.num_prefix)


def _block_pairs(num_queries: int, length: int) -> float:
    """Pairs of the last ``num_queries`` of ``length`` tokens with all tokens before their block's end."""
    pairs = 0
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        pairs += (stop - start) * (length - num_queries + stop)
    return pairs
