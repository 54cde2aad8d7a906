"""LLaMA's forward pass over slots: one call serves decoding rows and prompt chunks together.

Shapes: ``R`` decoding rows, ``M`` rows of all kinds, ``D`` model width, ``H`` query heads, ``K`` key/value heads,
``G = H / K``, ``W`` head width, ``L`` positions attended to.

The rows of a step lie in one matrix, so every weight is read once a step whatever mixture of requests it serves. Only
attention looks at requests one by one or in runs of neighbouring slots. Of decoding rows it reads keys and values where
they lie, in float32 on the CPU: bfloat16 takes five times as long for one row and three times for sixteen (measured:
its products are made for many queries; see ``preferred_kv_dtype``). A prompt's chunk has many, and casts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM

from babydoctor.engine.kv_cache import KeyValueMemory
from babydoctor.engine.linear import Linear, build_linear, packing_pays

LENGTH_STEP = 32
"""Lengths are rounded up to a multiple of this, so that matrix products keep their shape for that many steps:
oneDNN builds a kernel for each new shape."""

MAX_KEPT_VIEWS = 64
"""Runs whose views of the KV memory are kept; see ``Decoder._views``."""

CALL_POSITIONS = 512
"""What the two products of one more attention call cost, in positions read (measured); see ``plan_runs``."""


@dataclass(frozen=True, slots=True)
class Run:
    """Decoding rows ``first_row ..`` of neighbouring slots ``first_slot ..``, attending to ``length`` positions."""

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

    ``final``: the prompt ends here, so its last row's logits are wanted.
    """

    slot: int
    start: int
    embeds: torch.Tensor
    final: bool

    @property
    def end(self) -> int:
        return self.start + len(self.embeds)


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer, ready to run."""

    input_norm: torch.Tensor
    query_key_value: Linear
    output: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """The tensors of one step that all layers share.

    ``tokens`` ``[R]``; ``positions`` ``[M]``; ``write_index`` ``[R * K]``; ``wanted`` the rows whose logits are asked
    for, None when that is all of them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    write_index: torch.Tensor
    runs: list[Run]
    run_masks: list[torch.Tensor]
    chunk_masks: list[torch.Tensor]
    wanted: torch.Tensor | None


def plan_runs(slots: Sequence[int], lengths: Sequence[int], call_positions: int = CALL_POSITIONS) -> list[list[int]]:
    """Group sorted ``slots`` so that each group is attended to by one batched product over the slots it spans.

    A group pays for its longest length in every slot it spans, gaps included, and ``call_positions`` for the call;
    slots join the group before them as long as that is cheaper than a call of their own.
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


def round_up(length: int, capacity: int) -> int:
    return min(-(-length // LENGTH_STEP) * LENGTH_STEP, capacity)


class Decoder:
    """A LLaMA and its KV memory. Not thread-safe: one thread owns it.

    Args:
        model: weights are used where they are; ``pack`` makes a second copy in oneDNN's layout (None: when it pays).
        capacity: positions that rotary tables are made for, the longest context.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        memory: KeyValueMemory,
        *,
        pack: bool | None = None,
        compile_layers: bool = False,
    ) -> None:
        config = model.config
        self.memory = memory
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = memory.num_kv_heads
        self.head_dim = memory.head_dim
        self.scale = self.head_dim**-0.5
        self.eps = config.rms_norm_eps
        self.device = memory.device
        body = model.model
        if pack is None:
            pack = packing_pays(list(model.parameters()))
        dtype = body.norm.weight.dtype
        self.embed_tokens = body.embed_tokens
        assert config.hidden_act == "silu", f"a LLaMA with {config.hidden_act} between its layers"
        self.layers = [
            LayerWeights(
                layer.input_layernorm.weight.detach(),
                build_linear([attention.q_proj, attention.k_proj, attention.v_proj], dtype, pack=pack),
                build_linear([attention.o_proj], dtype, pack=pack),
                layer.post_attention_layernorm.weight.detach(),
                build_linear([layer.mlp.gate_proj, layer.mlp.up_proj], dtype, pack=pack),
                build_linear([layer.mlp.down_proj], dtype, pack=pack),
            )
            for layer in body.layers
            for attention in [layer.self_attn]
        ]
        self.final_norm = body.norm.weight.detach()
        self.lm_head = build_linear([model.lm_head], dtype, pack=pack)
        self.dtype = dtype
        positions = torch.arange(memory.capacity, device=self.device)[None]
        # In the memory's dtype: queries and keys are rotated in the precision in which they are kept.
        cos, sin = body.rotary_emb(torch.zeros(1, dtype=memory.dtype, device=self.device), positions)
        # rotate_half(x) = [-x2, x1] is a roll by half a head with the sign moved into the table.
        half = self.head_dim // 2
        self.cos = cos[0].unsqueeze(1)
        self.sin = torch.cat((-sin[0][:, :half], sin[0][:, half:]), dim=-1).unsqueeze(1)
        self._flat = [
            (keys.view(-1, self.head_dim), values.view(-1, self.head_dim))
            for keys, values in zip(memory.keys, memory.values, strict=True)
        ]
        self._run_views: dict[tuple[int, int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._normalize, self._rotate, self._gate = normalize, rotate, gate
        if compile_layers:
            # What lies between the matrix products is worth fusing; the products themselves are library calls anyway.
            self._normalize, self._rotate, self._gate = (
                torch.compile(function, dynamic=True) for function in (normalize, rotate, gate)
            )
        self._offsets = torch.arange(self.num_kv_heads, device=self.device) * memory.capacity
        self._slot_positions = positions[0]
        self._visible = torch.tensor(0.0, dtype=memory.dtype, device=self.device)
        self._hidden = torch.tensor(float("-inf"), dtype=memory.dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, rows: DecodeRows, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Run one step and write its keys and values into the slots.

        Returns:
            Logits ``[R + number of final chunks, vocabulary]``, decoding rows first.
        """
        return self.compute(self.lay_out(rows, chunks), chunks)

    def compute(self, plan: StepPlan, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The computation of a step that is laid out. Without chunks it can be recorded as a CUDA graph."""
        hidden = self.embed_tokens(plan.tokens)
        if chunks:
            hidden = torch.cat([hidden, *(chunk.embeds for chunk in chunks)])
        cos, sin = self.cos[plan.positions], self.sin[plan.positions]
        for index in range(len(self.layers) - 1):
            hidden = self._run_layer(index, hidden, cos, sin, plan, chunks)
        return self._finish(hidden, cos, sin, plan, chunks)

    def lay_out(self, rows: DecodeRows, chunks: Sequence[Chunk]) -> StepPlan:
        """Decide which rows are attended to together. A gap inside a run becomes a row that writes to scratch."""
        filled: list[tuple[int, int, int]] = []
        kept: list[int] = []
        lengths = [position + 1 for position in rows.positions]
        planned = []
        for group in plan_runs(rows.slots, lengths):
            first_row, first_slot = len(filled), rows.slots[group[0]]
            for index in group:
                while len(filled) - first_row < rows.slots[index] - first_slot:
                    filled.append((0, self.memory.scratch, 0))
                kept.append(len(filled))
                filled.append((rows.tokens[index], rows.slots[index], rows.positions[index]))
            longest = round_up(max(lengths[index] for index in group), self.memory.capacity)
            planned.append(Run(first_row, len(filled) - first_row, first_slot, longest))
        return self.build_plan(filled, planned, kept, chunks)

    def build_plan(
        self, filled: Sequence[tuple[int, int, int]], runs: list[Run], kept: Sequence[int], chunks: Sequence[Chunk]
    ) -> StepPlan:
        """The tensors of a step. ``filled`` is token, slot and position of each row; logits are kept of ``kept``."""
        # Where each row's key goes in keys.view(-1, W): slot, then head, then position.
        slot_size = self.num_kv_heads * self.memory.capacity
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
        return StepPlan(
            tokens=row_tokens,
            positions=all_positions,
            write_index=(row_starts[:, None] + self._offsets).flatten(),
            runs=runs,
            run_masks=[self._run_mask(run, all_positions) for run in runs],
            chunk_masks=[self._chunk_mask(chunk) for chunk in chunks],
            wanted=None if len(wanted) == len(positions) else all_wanted,
        )

    def _to_device(self, *columns: list[int]) -> tuple[torch.Tensor, ...]:
        """An int64 tensor for each list, all made and moved at once: each call costs some 10 µs."""
        together = torch.tensor([number for column in columns for number in column], dtype=torch.long)
        return together.to(self.device).split([len(column) for column in columns])

    def _run_mask(self, run: Run, positions: torch.Tensor) -> torch.Tensor:
        """``[R, 1, 1, L]``: 0 up to each row's own position, minus infinity beyond. ``positions`` begin with the
        decoding rows'."""
        reach = positions[run.first_row : run.first_row + run.num_rows, None]
        seen = self._slot_positions[: run.length] <= reach
        return torch.where(seen, self._visible, self._hidden)[:, None, None]

    def _chunk_mask(self, chunk: Chunk) -> torch.Tensor:
        """``[T, L]`` float32: each position of the chunk sees itself and what comes before."""
        mask = torch.full((chunk.end - chunk.start, chunk.end), float("-inf"), device=self.device)
        return mask.triu_(chunk.start + 1)

    def _run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: StepPlan,
        chunks: Sequence[Chunk],
    ) -> torch.Tensor:
        """One decoder layer over all rows: ``[M, D] -> [M, D]``."""
        layer = self.layers[index]
        query = self._project(index, hidden, cos, sin, plan, chunks)
        outputs = self._attend_runs(index, query, plan)
        row = len(plan.tokens)
        for chunk, mask in zip(chunks, plan.chunk_masks, strict=True):
            outputs.append(self._attend_chunk(index, query[row : row + len(mask)], chunk.slot, mask))
            row += len(mask)
        return self._add_mlp(layer, hidden + layer.output(_join(outputs)))

    def _finish(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: StepPlan, chunks: Sequence[Chunk]
    ) -> torch.Tensor:
        """The last layer and the logits. Of a chunk only the last row goes on, since nobody reads the others."""
        index = len(self.layers) - 1
        layer = self.layers[index]
        query = self._project(index, hidden, cos, sin, plan, chunks)
        outputs = self._attend_runs(index, query, plan)
        row = len(plan.tokens)
        if plan.wanted is not None and outputs:
            kept = plan.wanted[: len(plan.wanted) - sum(chunk.final for chunk in chunks)]
            outputs = [_join(outputs)[kept]]
        for chunk, mask in zip(chunks, plan.chunk_masks, strict=True):
            row += len(mask)
            if chunk.final:
                outputs.append(self._attend_chunk(index, query[row - 1 : row], chunk.slot, mask[-1:]))
        if not outputs:
            return hidden.new_zeros(0, 0)
        if plan.wanted is not None:
            hidden = hidden[plan.wanted]
        hidden = self._add_mlp(layer, hidden + layer.output(_join(outputs)))
        return self.lm_head(self._norm(hidden, self.final_norm))

    def _project(
        self,
        index: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: StepPlan,
        chunks: Sequence[Chunk],
    ) -> torch.Tensor:
        """Rotated queries ``[M, H, W]``; keys and values go into the slots."""
        layer = self.layers[index]
        num_rotated = self.num_heads + self.num_kv_heads
        projected = layer.query_key_value(self._norm(hidden, layer.input_norm))
        projected = projected.view(len(hidden), num_rotated + self.num_kv_heads, self.head_dim).to(self.memory.dtype)
        rotated = self._rotate(projected[:, :num_rotated], cos, sin)
        num_rows = len(plan.tokens)
        memories = (self.memory.keys[index], self.memory.values[index])
        news = (rotated[:, self.num_heads :], projected[:, num_rotated:])
        for memory, flat, new in zip(memories, self._flat[index], news, strict=True):
            if num_rows:
                flat.index_copy_(0, plan.write_index, new[:num_rows].reshape(-1, self.head_dim))
            row = num_rows
            for chunk in chunks:
                length = chunk.end - chunk.start
                memory[chunk.slot, :, chunk.start : chunk.end] = new[row : row + length].transpose(0, 1)
                row += length
        return rotated[:, : self.num_heads]

    def _attend_runs(self, index: int, query: torch.Tensor, plan: StepPlan) -> list[torch.Tensor]:
        """Attention of the decoding rows, a run at a time: ``[R, H * W]`` each."""
        outputs = []
        groups = self.num_heads // self.num_kv_heads
        for run, mask in zip(plan.runs, plan.run_masks, strict=True):
            # The G query heads of a key/value head stand as G queries of one head: nothing is repeated.
            rows = query[run.first_row : run.first_row + run.num_rows]
            rows = rows.reshape(run.num_rows, self.num_kv_heads, groups, self.head_dim)
            keys, values = self._views(run)[index]
            output = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=self.scale)
            outputs.append(output.reshape(run.num_rows, self.num_heads * self.head_dim).to(self.dtype))
        return outputs

    def _views(self, run: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values ``[R, K, L, W]`` that a run attends to, by layer. The same views serve many steps."""
        place = (run.first_slot, run.num_rows, run.length)
        if place not in self._run_views:
            if len(self._run_views) >= MAX_KEPT_VIEWS:
                self._run_views.clear()
            span = slice(run.first_slot, run.first_slot + run.num_rows)
            self._run_views[place] = [
                (keys[span, :, : run.length], values[span, :, : run.length])
                for keys, values in zip(self.memory.keys, self.memory.values, strict=True)
            ]
        return self._run_views[place]

    def _attend_chunk(self, index: int, query: torch.Tensor, slot: int, mask: torch.Tensor) -> torch.Tensor:
        """Attention of a prompt chunk: ``[T, H, W] -> [T, H * W]``; ``mask`` ``[T, L]``."""
        num_rows, length = mask.shape
        groups = self.num_heads // self.num_kv_heads
        rows = query.to(self.dtype).view(num_rows, self.num_kv_heads, groups, self.head_dim).permute(1, 2, 0, 3)
        rows = rows.reshape(self.num_kv_heads, groups * num_rows, self.head_dim)
        # Where the memory is float32 and the model bfloat16 (CPU), one cast a chunk makes the products twice as fast.
        keys = self.memory.keys[index][slot, :, :length].to(self.dtype)
        values = self.memory.values[index][slot, :, :length].to(self.dtype)
        scores = torch.bmm(rows, keys.transpose(1, 2)).view(self.num_kv_heads, groups, num_rows, length)
        weights = torch.softmax(torch.add(mask, scores, alpha=self.scale), dim=-1).to(self.dtype)
        output = torch.bmm(weights.flatten(1, 2), values)
        output = output.view(self.num_kv_heads, groups, num_rows, self.head_dim).permute(2, 0, 1, 3)
        return output.reshape(num_rows, self.num_heads * self.head_dim)

    def _add_mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + layer.down(self._gate(layer.gate_up(self._norm(hidden, layer.post_norm))))

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._normalize(hidden, weight, self.eps)


def normalize(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return rms_norm(hidden, weight.shape, weight, eps)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: ``[M, heads, W]``; the tables are ``[M, 1, W]``, the sign of ``rotate_half`` in ``sin``."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's product: ``[M, 2 * I] -> [M, I]``."""
    left, right = gate_up.chunk(2, dim=-1)
    return silu(left) * right


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
