"""The contents of a micro-batch and its floating point operations. Arithmetic only.

``memory.py`` counts bytes and explains the symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

FLOAT32 = 4


@dataclass(frozen=True)
class Architecture:
    """The sizes of the model that costs depend on."""

    num_layers: int
    hidden_size: int
    query_size: int
    """Queries of one token, over all heads: the hidden size, unless heads have a separate size (Qwen3)."""
    kv_size: int
    """Keys (or values) of one token, over all heads."""
    intermediate_size: int
    num_heads: int
    vocab_size: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_layers: int
    """Number of layers of the tower that are computed."""
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
    has_head_norms: bool = False
    """True if queries and keys are normalized by head (Qwen3)."""

    @property
    def head_dim(self) -> int:
        return self.query_size // self.num_heads

    @property
    def lora_parameters_per_layer(self) -> int:
        return sum(self.lora_rank * sum(sizes) for name, sizes in self.linears().items() if name in self.lora_modules)

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        lora = self.num_layers * self.lora_parameters_per_layer
        return lora + (self.projector_parameters if self.trains_projector else 0)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output size of each linear of a decoder layer."""
        w, q, k, i = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        return {
            "q_proj": (w, q),
            "k_proj": (w, k),
            "v_proj": (w, k),
            "o_proj": (q, w),
            "gate_proj": (w, i),
            "up_proj": (w, i),
            "down_proj": (i, w),
        }


@dataclass(frozen=True)
class Work:
    """One micro-batch of documents of equal length; all share the first ``num_prefix`` of ``num_tokens``.

    ``num_tail`` counts the tokens from each document's first loss position on.
    """

    num_tokens: int
    num_documents: float
    num_tail: int
    num_supervised: int
    num_images: float
    num_prefix: int = 0

    @property
    def own_length(self) -> float:
        """Tokens of a document after the shared prefix."""
        return (self.num_tokens - self.num_prefix) / max(1.0, self.num_documents)


ONLY_TAIL = frozenset({"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Linears that the last layer computes for the tail tokens alone."""


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a micro-batch by part; a multiply-add counts as two."""

    vision: float
    base_forward: float
    base_backward: float
    lora: float
    attention: float
    logits: float
    recomputed: float

    @property
    def model(self) -> float:
        """The operations without recomputation, which MFU counts."""
        return self.total - self.recomputed

    def times(self, number: float) -> Flops:
        """The operations of ``number`` micro-batches."""
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
    """Operations of forward and backward for one micro-batch.

    Frozen weights need the gradient of their input only, so their backward pass costs what the forward pass does.
    LoRA's weights also need their own gradient. Attention's backward pass has four products, and the forward pass
    has two. The vision tower runs forward only.
    """
    base = lora = attention = recomputed = 0.0
    for index in range(shape.num_layers):
        is_last = index == shape.num_layers - 1
        layer_base = layer_lora = 0.0
        skipped = 0.0
        for name, (in_size, out_size) in shape.linears().items():
            rows = work.num_tail if is_last and name in ONLY_TAIL else work.num_tokens
            layer_base += 2 * rows * in_size * out_size
            has_lora = bool(shape.lora_rank) and name in shape.lora_modules
            if has_lora:
                layer_lora += 2 * rows * shape.lora_rank * (in_size + out_size)
            elif name == "down_proj":  # recomputation ends with the last tensor that the backward pass needs
                skipped = 2 * rows * in_size * out_size
        layer_attention = attention_flops(shape, work, is_last=is_last)
        base += layer_base
        lora += layer_lora
        attention += layer_attention
        if recompute_every and index % recompute_every == 0:
            recomputed += layer_base + layer_lora + layer_attention - skipped
    return Flops(
        vision=vision_flops(shape, work),
        base_forward=base,
        base_backward=base,
        lora=3 * lora,
        attention=3 * attention,
        logits=4 * work.num_supervised * shape.hidden_size * shape.vocab_size,
        recomputed=recomputed,
    )


def attention_flops(shape: Architecture, work: Work, *, is_last: bool) -> float:
    """Scores and weighted sums of one layer: each token with the shared prefix and its own document before it.

    A sliding window is not subtracted: the published ones are longer than the documents of a stage.
    """
    own = work.num_tokens - work.num_prefix
    pairs = (work.num_prefix + work.own_length / 2) * own + work.num_prefix**2 / 2
    if is_last:
        pairs = min(pairs, (work.num_prefix + work.own_length) * work.num_tail)
    return 4 * pairs * shape.query_size


def vision_flops(shape: Architecture, work: Work) -> float:
    """The tower forward; the projector forward and, if it trains, the gradient of its weight."""
    width, patches = shape.vision_hidden_size, work.num_images * shape.num_patches
    total = 2 * patches * shape.vision_layers * (4 * width**2 + 2 * width * shape.vision_intermediate_size)
    total += 4 * patches * shape.num_patches * width * shape.vision_layers
    total += 2 * patches * 3 * shape.patch_size**2 * width
    return total + 2 * patches * shape.projector_parameters * (2 if shape.trains_projector else 1)


def passes_over_weights(recompute_every: int) -> float:
    """How often a micro-batch reads each frozen weight: forward, backward, and again if the layer is recomputed."""
    return 2 + (1 / recompute_every if recompute_every else 0)
