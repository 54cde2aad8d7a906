"""The language model's forward pass over KV slots. One call serves decoding rows and prompt chunks together.

Shapes: ``R`` decoding rows, ``M`` rows of all kinds, ``D`` hidden size, ``H`` query heads, ``K`` key/value heads,
``G = H / K``, ``W`` head size, ``L`` positions attended to.

All rows of a step form one matrix, so each weight is read once per step. Only attention handles requests separately,
or in runs of neighboring slots. Decoding rows read keys and values in place, in float32 on the CPU: with so few
queries, bfloat16 takes five times as long for one row and three times for sixteen (measured; see
``preferred_kv_dtype``). A prompt chunk has many queries and casts its keys and values once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention, silu

from babydoctor.engine.kv_cache import CacheSource
from babydoctor.engine.layout import Chunk, ChunkBlock, DecodeRows, LayoutBuilder, RowGroup, StepLayout
from babydoctor.engine.linear import Linear, build_linear, packing_pays, round_rows
from babydoctor.engine.settings import kv_shape
from babydoctor.model.families import LanguageModel, sliding_window

MAX_KEPT_VIEWS = 64
"""Number of runs whose views of the KV cache are kept; see ``Decoder._views``."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer, ready to run. ``head_norm`` ``[H + K, W]``: Qwen3's norm of query and key heads, or None."""

    input_norm: torch.Tensor
    query_key_value: Linear
    output: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    head_norm: torch.Tensor | None = None


class Decoder:
    """A language model and its KV cache. Not thread-safe: one thread owns it.

    Args:
        model: its weights are used in place.
        pack: copy the weights into oneDNN's layout; None: when that is faster and fits in memory.
        own: the weights may be joined in place; see ``build_linear``.
    """

    has_graphs = False
    """True if steps are replayed as CUDA graphs."""

    def __init__(
        self, model: LanguageModel, kv_cache: CacheSource, *, pack: bool | None = None, own: bool = False
    ) -> None:
        config, body = model.config, model.model
        self.num_heads = config.num_attention_heads
        _, self.num_kv_heads, self.head_dim = kv_shape(config)
        self.scale = self.head_dim**-0.5
        self.eps = config.rms_norm_eps
        self.dtype, self.device = body.norm.weight.dtype, body.norm.weight.device
        self._pack = packing_pays(list(model.parameters())) if pack is None else pack
        self._own = own
        self.embed_tokens = body.embed_tokens
        self.layers = [
            LayerWeights(
                layer.input_layernorm.weight.detach(),
                self._build_linear([attention.q_proj, attention.k_proj, attention.v_proj]),
                self._build_linear([attention.o_proj]),
                layer.post_attention_layernorm.weight.detach(),
                self._build_linear([layer.mlp.gate_proj, layer.mlp.up_proj]),
                self._build_linear([layer.mlp.down_proj]),
                self._head_norm(attention) if has_head_norms(model) else None,
            )
            for layer in body.layers
            for attention in [layer.self_attn]
        ]
        self.final_norm = body.norm.weight.detach()
        self.lm_head = self._build_linear([model.lm_head])
        self.kv_cache = kv_cache = kv_cache() if callable(kv_cache) else kv_cache
        self.layout = LayoutBuilder(kv_cache, sliding_window(config), self.dtype)
        positions = torch.arange(kv_cache.capacity, device=self.device)[None]
        # In the KV cache's dtype, so that queries and keys are rotated in the precision of the cache.
        cos, sin = body.rotary_emb(torch.zeros(1, dtype=kv_cache.dtype, device=self.device), positions)
        # rotate_half(x) = [-x2, x1] is a roll by half a head, with the sign moved into the table.
        half = self.head_dim // 2
        self.cos = cos[0].unsqueeze(1)
        self.sin = torch.cat((-sin[0][:, :half], sin[0][:, half:]), dim=-1).unsqueeze(1)
        self._flat = [
            (keys.view(-1, self.head_dim), values.view(-1, self.head_dim))
            for keys, values in zip(kv_cache.keys, kv_cache.values, strict=True)
        ]
        self._run_views: dict[tuple[int, int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def _build_linear(self, modules: Sequence[nn.Module]) -> Linear:
        """One product for linear modules with the same input."""
        multiply = build_linear(modules, self.dtype, pack=self._pack, own=self._own)
        return round_rows(multiply) if self.device.type == "cpu" else multiply

    def _head_norm(self, attention: Any) -> torch.Tensor:
        """The norms' weights of all query and key heads, ``[H + K, W]``."""
        query, key = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
        return torch.cat((query.expand(self.num_heads, -1), key.expand(self.num_kv_heads, -1)))

    @torch.inference_mode()
    def forward(self, rows: DecodeRows, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Run one step and write its keys and values into the slots.

        Returns:
            Logits ``[R + number of final chunks, vocabulary]``, decoding rows first.
        """
        return self.compute(self.layout.group(rows, chunks), chunks)

    def compute(self, layout: StepLayout, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute a step."""
        hidden = self.embed_tokens(layout.tokens)
        if chunks:
            hidden = torch.cat([hidden, *(chunk.embeds for chunk in chunks)])
        cos, sin = self.cos[layout.positions], self.sin[layout.positions]
        for index in range(len(self.layers) - 1):
            hidden = self._run_layer(index, hidden, cos, sin, layout, chunks)
        return self._finish(hidden, cos, sin, layout, chunks)

    def _run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: StepLayout,
        chunks: Sequence[Chunk],
    ) -> torch.Tensor:
        """One decoder layer over all rows: ``[M, D] -> [M, D]``."""
        layer = self.layers[index]
        query = self._project(index, hidden, cos, sin, layout, chunks)
        outputs = self._attend_runs(index, query, layout)
        row = len(layout.tokens)
        for chunk, blocks in zip(chunks, layout.chunk_blocks, strict=True):
            outputs += self._attend_chunk(index, query[row : row + len(chunk.embeds)], chunk.slot, blocks)
            row += len(chunk.embeds)
        return self._add_mlp(layer, hidden + layer.output(_join(outputs)))

    def _finish(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout, chunks: Sequence[Chunk]
    ) -> torch.Tensor:
        """The last layer and the logits. Of a final chunk only the last row is computed, since only it needs logits."""
        index = len(self.layers) - 1
        layer = self.layers[index]
        query = self._project(index, hidden, cos, sin, layout, chunks)
        outputs = self._attend_runs(index, query, layout)
        row = len(layout.tokens)
        if layout.wanted is not None and outputs:
            kept = layout.wanted[: len(layout.wanted) - sum(chunk.final for chunk in chunks)]
            outputs = [_join(outputs)[kept]]
        for chunk, blocks in zip(chunks, layout.chunk_blocks, strict=True):
            if chunk.final:
                rows = query[row : row + len(chunk.embeds)]
                outputs += self._attend_chunk(index, rows, chunk.slot, [blocks[-1].last_row()])
            row += len(chunk.embeds)
        if not outputs:
            return hidden.new_zeros(0, 0)
        if layout.wanted is not None:
            hidden = hidden[layout.wanted]
        hidden = self._add_mlp(layer, hidden + layer.output(_join(outputs)))
        return self.lm_head(self._norm(hidden, self.final_norm))

    def _project(
        self,
        index: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: StepLayout,
        chunks: Sequence[Chunk],
    ) -> torch.Tensor:
        """Write keys and values into the slots and return the rotated queries ``[M, H, W]``."""
        layer = self.layers[index]
        num_rotated = self.num_heads + self.num_kv_heads
        projected = layer.query_key_value(self._norm(hidden, layer.input_norm))
        projected = projected.view(len(hidden), num_rotated + self.num_kv_heads, self.head_dim)
        if layer.head_norm is not None:
            heads = rms_norm(projected[:, :num_rotated], (self.head_dim,), None, self.eps) * layer.head_norm
            projected = torch.cat((heads, projected[:, num_rotated:]), dim=1)
        projected = projected.to(self.kv_cache.dtype)
        rotated = rotate(projected[:, :num_rotated], cos, sin)
        num_rows = len(layout.tokens)
        caches = (self.kv_cache.keys[index], self.kv_cache.values[index])  # [S + 1, K, C, W]
        news = (rotated[:, self.num_heads :], projected[:, num_rotated:])
        for cache, flat, new in zip(caches, self._flat[index], news, strict=True):
            if num_rows:
                flat.index_copy_(0, layout.write_index, new[:num_rows].reshape(-1, self.head_dim))
            row = num_rows
            for chunk in chunks:
                length = chunk.end - chunk.start
                cache[chunk.slot, :, chunk.start : chunk.end] = new[row : row + length].transpose(0, 1)
                row += length
        return rotated[:, : self.num_heads]

    def _attend_runs(self, index: int, query: torch.Tensor, layout: StepLayout) -> list[torch.Tensor]:
        """Attention of the decoding rows: ``[rows, H * W]`` for each run."""
        outputs = []
        groups = self.num_heads // self.num_kv_heads
        for run, mask in zip(layout.runs, layout.run_masks, strict=True):
            # The G query heads of a key/value head become G queries of one head, so no key is repeated.
            rows = query[run.first_row : run.first_row + run.num_rows]
            rows = rows.reshape(run.num_rows, self.num_kv_heads, groups, self.head_dim)  # [rows, K, G, W]
            keys, values = self._views(run)[index]
            output = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=self.scale)
            outputs.append(output.reshape(run.num_rows, self.num_heads * self.head_dim).to(self.dtype))
        return outputs

    def _views(self, run: RowGroup) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values ``[rows, K, L, W]`` that a run attends to, by layer. Views are reused by later steps."""
        key = (run.first_slot, run.num_rows, run.length)
        if key not in self._run_views:
            if len(self._run_views) >= MAX_KEPT_VIEWS:
                self._run_views.clear()
            span = slice(run.first_slot, run.first_slot + run.num_rows)
            self._run_views[key] = [
                (keys[span, :, : run.length], values[span, :, : run.length])
                for keys, values in zip(self.kv_cache.keys, self.kv_cache.values, strict=True)
            ]
        return self._run_views[key]

    def _attend_chunk(
        self, index: int, query: torch.Tensor, slot: int, blocks: Sequence[ChunkBlock]
    ) -> list[torch.Tensor]:
        """Attention of a prompt chunk, ``[T, H, W]``: ``[rows, H * W]`` for each block."""
        length = blocks[-1].length
        # With a float32 cache and a bfloat16 model (CPU), one cast per chunk makes the products twice as fast.
        keys = self.kv_cache.keys[index][slot, :, :length].to(self.dtype)
        values = self.kv_cache.values[index][slot, :, :length].to(self.dtype)
        return [
            self._attend_block(query, keys[:, : block.length], values[:, : block.length], block) for block in blocks
        ]

    def _attend_block(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: ChunkBlock
    ) -> torch.Tensor:
        """Rows of ``query`` ``[T, H, W]`` over keys and values ``[K, L, W]``: ``[rows, H * W]``."""
        rows, filled = block.num_rows, len(block.mask)
        groups = self.num_heads // self.num_kv_heads
        query = query[block.first_row : block.first_row + rows].to(self.dtype)
        query = pad(query, (0, 0, 0, 0, 0, filled - rows)).view(filled, self.num_kv_heads, groups, self.head_dim)
        query = query.permute(1, 2, 0, 3).reshape(self.num_kv_heads, groups * filled, self.head_dim)  # [K, G * T, W]
        # The product copies strided keys. Copied here, whole rows move; there, single numbers, which takes four times
        # as long.
        keys = keys.contiguous().transpose(1, 2)
        scores = torch.baddbmm(keys.new_empty(1), query, keys, beta=0, alpha=self.scale)
        scores = scores.view(self.num_kv_heads, groups, filled, block.length)
        scores[..., block.masked_from :] += block.mask
        # Rounded once: softmax computes in float32 and returns the scores' dtype.
        output = torch.bmm(torch.softmax(scores, dim=-1).flatten(1, 2), values)
        output = output.view(self.num_kv_heads, groups, filled, self.head_dim)[:, :, :rows]
        return output.permute(2, 0, 1, 3).reshape(rows, self.num_heads * self.head_dim)

    def _add_mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + layer.down(gate(layer.gate_up(self._norm(hidden, layer.post_norm))))

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return normalize(hidden, weight, self.eps)


def has_head_norms(model: LanguageModel) -> bool:
    """True if queries and keys are normalized by head."""
    return hasattr(model.model.layers[0].self_attn, "q_norm")


def normalize(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return rms_norm(hidden, weight.shape, weight, eps)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[M, heads, W]``. Tables are ``[M, 1, W]``; ``sin`` carries the sign of ``rotate_half``."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU: ``[M, 2 * I] -> [M, I]``."""
    left, right = gate_up.chunk(2, dim=-1)
    return silu(left) * right


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
