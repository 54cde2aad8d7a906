"""What one micro-batch costs in bytes and in floating point operations. Arithmetic only.

The formulas follow ``model/decoder.py``, ``model/linear.py``, ``model/attention.py`` and ``model/loss.py`` tensor by
tensor; a test holds them against what autograd really keeps. Whoever changes what those modules keep changes this.

Symbols: ``T`` positions of the micro-batch, ``Q`` positions from each document's first target on, ``W`` text width,
``K`` width of keys and values, ``I`` feed-forward width, ``r`` LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from babydoctor.model.packed.attention import QUERY_BLOCK
from babydoctor.model.packed.loss import chunk_rows

FLOAT32 = 4


@dataclass(frozen=True)
class Architecture:
    """The sizes of the model that costs depend on."""

    num_layers: int
    width: int
    kv_width: int
    intermediate: int
    num_heads: int
    vocabulary: int
    vision_width: int
    vision_intermediate: int
    vision_layers: int
    """Layers of the tower that are computed."""
    num_patches: int
    image_size: int
    patch_size: int
    projector_parameters: int
    dtype_bytes: int = 2
    is_4bit: bool = False
    lora_rank: int = 0
    lora_dropout: bool = False
    lora_modules: frozenset[str] = frozenset()
    trains_projector: bool = True

    def linears(self) -> dict[str, tuple[int, int]]:
        """(input, output) width of each linear of a decoder layer."""
        w, k, i = self.width, self.kv_width, self.intermediate
        return {
            "q_proj": (w, w),
            "k_proj": (w, k),
            "v_proj": (w, k),
            "o_proj": (w, w),
            "gate_proj": (w, i),
            "up_proj": (w, i),
            "down_proj": (i, w),
        }


@dataclass(frozen=True)
class Work:
    """One micro-batch. Documents are taken as equally long; ``num_prefix`` of ``num_tokens`` are shared by all."""

    num_tokens: int
    num_documents: float
    num_tail: int
    num_supervised: int
    num_images: float
    num_prefix: int = 0

    @property
    def own_length(self) -> float:
        """Positions of a document behind the shared ones."""
        return (self.num_tokens - self.num_prefix) / max(1.0, self.num_documents)


LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ONLY_TAIL = frozenset({"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""What the last layer computes at the tail positions alone."""


def layer_activation_bytes(shape: Architecture, work: Work, *, is_last: bool, is_cuda: bool) -> float:
    """What autograd keeps of one decoder layer that is not recomputed."""
    b, t = shape.dtype_bytes, work.num_tokens
    q = work.num_tail if is_last else t
    w, i = shape.width, shape.intermediate
    grouped = shape.kv_width != w
    total: float = t * (w * b + FLOAT32) + q * (w * b + FLOAT32)  # inputs of the two norms and their inverse rms
    total += (q + t) * w * b  # rotated queries and keys; keys of grouped heads are repeated
    total += t * (w if grouped else shape.kv_width) * b  # values
    if is_cuda:
        total += q * (w * b + shape.num_heads * FLOAT32)  # attention's result and log-sum-exp
        total += 2 * work.num_prefix * work.num_documents * w * b  # the prefix, copied for each document
    else:
        total += attention_scores(work, is_last=is_last) * shape.num_heads * b  # probabilities
    total += 2 * q * i * b  # gate and up
    return total + lora_activation_bytes(shape, work, is_last=is_last, is_cuda=is_cuda)


def lora_activation_bytes(shape: Architecture, work: Work, *, is_last: bool, is_cuda: bool) -> float:
    """What the LoRA of one layer keeps: dropped-out inputs, dropout masks and low-rank products."""
    if not shape.lora_rank:
        return 0.0
    b, total = shape.dtype_bytes, 0.0
    groups = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    if is_last:
        groups[0:1] = [("k_proj", "v_proj"), ("q_proj",)]
    for group in groups:
        members = [name for name in group if name in shape.lora_modules]
        if not members:
            continue
        rows = work.num_tail if is_last and group[0] in ONLY_TAIL else work.num_tokens
        width = shape.linears()[group[0]][0]
        kept_anyway = not shape.lora_dropout and is_cuda and group == ("o_proj",)  # attention keeps its result
        total += 0 if kept_anyway else rows * width * b
        total += rows * width if shape.lora_dropout else 0
        total += rows * shape.lora_rank * b * len(members)
    return total


def attention_scores(work: Work, *, is_last: bool) -> float:
    """Query-key pairs that the CPU's blocks compute, for one head."""
    own = round(work.own_length)
    asking = min(own, round(work.num_tail / max(1.0, work.num_documents))) if is_last else own
    pairs = _block_pairs(asking, work.num_prefix + own) * work.num_documents
    return pairs if is_last else pairs + _block_pairs(work.num_prefix, work.num_prefix)


def _block_pairs(asking: int, length: int) -> float:
    """Pairs of the last ``asking`` of ``length`` positions with what stands before their block's end."""
    pairs = 0
    for start in range(0, asking, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, asking)
        pairs += (stop - start) * (length - asking + stop)
    return pairs


def shared_activation_bytes(shape: Architecture, work: Work) -> float:
    """What is kept outside the layers: projector, image slots, rotary tables, final norm, gradient of the loss."""
    b, patches = shape.dtype_bytes, work.num_images * shape.num_patches
    head_dim = shape.width // shape.num_heads
    total: float = work.num_tokens * 2 * head_dim * b  # cos and sin
    total += work.num_tokens * shape.width * b  # the embeddings, which the first layer reads
    total += work.num_tail * (shape.width * b + FLOAT32)
    total += work.num_supervised * shape.width * b  # gradient at the targets, made in the forward pass
    total += work.num_images * 3 * shape.image_size**2 * FLOAT32
    if shape.trains_projector:
        total += patches * shape.vision_width * b + shape.projector_parameters * b
    return total


def recomputed_layer_bytes(shape: Architecture, work: Work) -> float:
    """What is kept of a layer that is recomputed: its input."""
    return work.num_tokens * shape.width * shape.dtype_bytes


def backward_transient_bytes(shape: Architecture, work: Work) -> float:
    """The most that one layer's backward pass needs for a moment beside what is kept.

    It is reached in the feed-forward layer, where the gradient of ``silu(gate) * up`` is pulled apart: that gradient,
    two products, and the gradients of gate and up; beside them the gradient of the residual stream. A 4-bit weight
    is dequantised meanwhile.
    """
    b, t = shape.dtype_bytes, work.num_tokens
    weight = shape.width * shape.intermediate * b if shape.is_4bit else 0
    dropped = 2 * t * shape.intermediate * b if "down_proj" in shape.lora_modules and shape.lora_dropout else 0
    swiglu = 4 * t * shape.intermediate * b
    return t * shape.width * b + max(swiglu, dropped + weight)


def logits_bytes(shape: Architecture, work: Work, *, is_cuda: bool) -> float:
    """Logits of one chunk: in the model's dtype and twice in float32."""
    rows = min(work.num_supervised, chunk_rows(shape.vocabulary, is_cuda=is_cuda))
    return rows * shape.vocabulary * (shape.dtype_bytes + 2 * FLOAT32)


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one micro-batch by part (a multiply-add is two)."""

    vision: float
    base_forward: float
    base_backward: float
    lora: float
    attention: float
    logits: float
    recomputed: float

    @property
    def model(self) -> float:
        """What the mathematics asks for."""
        return self.total - self.recomputed

    def times(self, number: float) -> Flops:
        """Of so many micro-batches."""
        return Flops(**{part.name: getattr(self, part.name) * number for part in fields(self)})

    @property
    def total(self) -> float:
        return (
            self.vision
            + self.base_forward
            + self.base_backward
            + self.lora
            + self.attention
            + self.logits
            + self.recomputed
        )


def count_flops(shape: Architecture, work: Work, recompute_every: int) -> Flops:
    """Operations of forward and backward.

    Frozen weights need the gradient of their input only, so backward costs what forward does; LoRA's own weights
    need theirs too.
    """
    base = lora = attention = recomputed = 0.0
    for index in range(shape.num_layers):
        is_last = index == shape.num_layers - 1
        layer_base = layer_lora = 0.0
        for name, (wide_in, wide_out) in shape.linears().items():
            rows = work.num_tail if is_last and name in ONLY_TAIL else work.num_tokens
            layer_base += 2 * rows * wide_in * wide_out
            if shape.lora_rank and name in shape.lora_modules:
                layer_lora += 2 * rows * shape.lora_rank * (wide_in + wide_out)
        own = work.num_tokens - work.num_prefix
        pairs = (work.num_prefix + work.own_length / 2) * own + work.num_prefix**2 / 2
        if is_last:
            pairs = min(pairs, (work.num_prefix + work.own_length) * work.num_tail)
        layer_attention = 4 * pairs * shape.width  # scores and mixing
        base += layer_base
        lora += layer_lora
        attention += layer_attention
        if recompute_every and index % recompute_every == 0:
            recomputed += layer_base + layer_lora + layer_attention
    tower = 4 * shape.vision_width**2 + 2 * shape.vision_width * shape.vision_intermediate
    patches = work.num_images * shape.num_patches
    vision = 2 * patches * shape.vision_layers * tower
    vision += 4 * patches * shape.num_patches * shape.vision_width * shape.vision_layers
    vision += 2 * patches * 3 * shape.patch_size**2 * shape.vision_width
    vision += 2 * patches * shape.projector_parameters * (2 if shape.trains_projector else 1)
    return Flops(
        vision=vision,
        base_forward=base,
        base_backward=base,
        lora=3 * lora,
        attention=3 * attention,
        logits=4 * work.num_supervised * shape.width * shape.vocabulary,
        recomputed=recomputed,
    )
