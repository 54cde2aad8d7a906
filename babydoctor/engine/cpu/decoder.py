"""An engine step on a CPU: decoding rows by one call of a compiled operator, prompt chunks by PyTorch.

Shapes as in ``engine/decoder.py``. Weights are bfloat16 or int8, keys and values bfloat16, sums float32. With int8
weights each row of a product's input is rounded to eight bits as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from babydoctor.engine.cpu.library import Operator, StepLayer, StepModel, StepProduct, layer_array, load_operator
from babydoctor.engine.decoder import Decoder, has_head_norms
from babydoctor.engine.kv_cache import KVCache
from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.engine.settings import kv_shape
from babydoctor.model.families import LanguageModel, sliding_window
from babydoctor.model.nf4 import is_4bit
from babydoctor.model.packed.lora_linear import effective_weight, has_lora

BLOCK = 64
"""Outputs per block of packed weights."""

QUANTIZED_ROWS = 1024
"""Rows of weights that are quantized together."""

LANES = 16
"""Sizes must be multiples of this: the operator's vectors hold 16 numbers."""

MAX_HEAD_DIM = 512


class PackedProduct:
    """Linear modules with the same input as one packed product: bfloat16 ``[M, in] -> [M, out]``.

    Args:
        weights: ``[out, in]`` each; their outputs are concatenated.
        is_int8: round each output's weights to eight bits with a scale of their own.
    """

    def __init__(self, operator: Operator, weights: Sequence[torch.Tensor], *, is_int8: bool) -> None:
        self._operator = operator
        joined = torch.cat([weight.detach() for weight in weights])
        outputs, inputs = joined.shape
        padded = torch.nn.functional.pad(joined, (0, 0, 0, -outputs % BLOCK))
        scales = sums = None
        group = 2
        if is_int8:
            group = 4
            scales = (padded.abs().amax(1).float() / 127).clamp_min(1e-12)
            # Block by block, because a whole product in float32 takes four times the memory of the result.
            blocks = zip(padded.split(QUANTIZED_ROWS), scales.split(QUANTIZED_ROWS), strict=True)
            padded = torch.cat([(rows.float() / scale[:, None]).round().to(torch.int8) for rows, scale in blocks])
            sums = padded.sum(1, dtype=torch.int32)
        packed = padded.view(-1, BLOCK, inputs // group, group).transpose(1, 2).contiguous()
        self._tensors = (packed, scales, sums)  # the pointers' owners
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        self.structure = StepProduct(*pointers, outputs, inputs)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        output = rows.new_empty(len(rows), self.structure.outputs)
        pointers = (rows.data_ptr(), output.data_ptr())
        self._operator.multiply(self.structure, torch.get_num_threads(), len(rows), *pointers)
        return output


class CpuDecoder(Decoder):
    """A LLaMA in bfloat16 or int8 on a CPU; see ``fits`` for the models it can run. Its weights are copied.

    Args:
        own: free the model's weights once they are copied. The model is then of no other use.
    """

    def __init__(self, model: LanguageModel, kv_cache: KVCache, *, is_int8: bool = False, own: bool = False) -> None:
        operator = load_operator()
        assert operator is not None and fits(model, rounds=is_int8), "checked by the caller"
        self._operator, self._is_int8 = operator, is_int8
        super().__init__(model, kv_cache, pack=False, own=own)
        head: Any = self.lm_head
        self._vocab_size = head.structure.outputs
        self._tables = [table[:, 0].float().contiguous() for table in (self.cos, self.sin)]  # [C, W]
        self._layers = layer_array([self._layer(index) for index in range(len(self.layers))])
        self._model = StepModel(
            len(self.layers),
            model.config.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            kv_cache.capacity,
            1,
            self.eps,
            self.scale,
            self.embed_tokens.weight.data_ptr(),
            self.final_norm.data_ptr(),
            *(table.data_ptr() for table in self._tables),
            head.structure,
            self._layers,
        )

    def _build_linear(self, modules: Sequence[nn.Module]) -> PackedProduct:
        weights = [effective_weight(module, self.dtype) for module in modules]
        product = PackedProduct(self._operator, weights, is_int8=self._is_int8)
        if self._own:
            for module in modules:
                self._free(module)
        return product

    def _free(self, module: nn.Module) -> None:
        """Free the weights of a module, except for a head that shares them with the embedding."""
        for parameter in module.parameters():
            if parameter.data_ptr() != self.embed_tokens.weight.data_ptr():
                parameter.data = parameter.data.new_empty(0)

    def _layer(self, index: int) -> StepLayer:
        layer: Any = self.layers[index]
        products = (layer.query_key_value, layer.output, layer.gate_up, layer.down)
        keys, values = self.kv_cache.keys[index], self.kv_cache.values[index]
        return StepLayer(
            layer.input_norm.data_ptr(),
            layer.post_norm.data_ptr(),
            *(product.structure for product in products),
            keys.data_ptr(),
            values.data_ptr(),
        )

    @torch.inference_mode()
    def forward(self, rows: DecodeRows, chunks: Sequence[Chunk]) -> torch.Tensor:
        num_rows = len(rows.tokens)
        parts = []
        if num_rows:
            logits = torch.empty(num_rows, self._vocab_size)
            numbers = torch.tensor([rows.tokens, rows.slots, rows.positions])
            self._model.threads = torch.get_num_threads()
            pointers = [part.data_ptr() for part in (*numbers, logits)]
            self._operator.step(self._model, num_rows, pointers)
            parts.append(logits)
        if chunks:
            parts.append(super().forward(DecodeRows([], [], []), chunks).float())
        return parts[0] if len(parts) == 1 else torch.cat([part for part in parts if part.numel()])


def fits(model: LanguageModel, *, rounds: bool = False) -> bool:
    """True if the operator can run a model: bfloat16 on the CPU, without biases, head norms and sliding window.

    Args:
        rounds: the weights will be rounded to int8, so they may also be 4-bit, and a LoRA may be merged into them.
            Otherwise such models keep PyTorch's operations, whose numbers are those of training.
    """
    config = model.config
    head_dim = kv_shape(config)[2]
    sizes = (config.hidden_size, config.intermediate_size, head_dim)
    modules: list[Any] = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    if rounds:
        modules = [module.base_layer if has_lora(module) else module for module in modules]
    return (
        all(parameter.device.type == "cpu" for parameter in model.parameters())
        and all(
            parameter.dtype == torch.bfloat16 or (rounds and ("lora_" in name or parameter.dtype == torch.uint8))
            for name, parameter in model.named_parameters()
        )
        and all(
            (type(module) is nn.Linear or (rounds and is_4bit(module))) and module.bias is None for module in modules
        )
        and all(size % LANES == 0 for size in sizes)
        and head_dim <= MAX_HEAD_DIM
        and sliding_window(config) is None
        and not has_head_norms(model)
    )
