"""An engine step on a CPU: decoding rows by one call of a compiled operator, prompt chunks by PyTorch.

Shapes as in ``engine/decoder.py``. Weights are bfloat16, int8 or NF4, keys and values bfloat16, sums float32. With int8
weights each row of a product's input is rounded to eight bits as well, and LoRAs are merged. Otherwise LoRAs are
computed beside the weights, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from babydoctor.engine.cpu.library import StepLayer, StepModel, layer_array, load_operator
from babydoctor.engine.cpu.product import LANES, PackedProduct, build_product
from babydoctor.engine.decoder import Decoder, has_head_norms
from babydoctor.engine.kv_cache import CacheSource
from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.engine.settings import kv_shape
from babydoctor.model.families import LanguageModel, sliding_window
from babydoctor.model.nf4 import is_4bit
from babydoctor.model.packed.lora_linear import base_layer

MAX_HEAD_DIM = 512


class CpuDecoder(Decoder):
    """A LLaMA in bfloat16, int8 or NF4 on a CPU; see ``fits`` for the models it can run. Its weights are copied.

    Args:
        own: free the model's weights once they are copied. The model is then of no other use.
    """

    def __init__(
        self, model: LanguageModel, kv_cache: CacheSource, *, is_int8: bool = False, own: bool = False
    ) -> None:
        operator = load_operator()
        assert operator is not None and fits(model), "checked by the caller"
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
            self.kv_cache.capacity,
            1,  # threads, set in each step
            max(product.rank for product in (head, *(part for layer in self.layers for part in _products(layer)))),
            self.eps,
            self.scale,
            self.embed_tokens.weight.data_ptr(),
            self.final_norm.data_ptr(),
            *(table.data_ptr() for table in self._tables),
            head.structure,
            self._layers,
        )

    def _build_linear(self, modules: Sequence[nn.Module]) -> PackedProduct:
        product = build_product(self._operator, modules, is_int8=self._is_int8)
        if self._own:
            for module in modules:
                self._free(module)
        return product

    def _free(self, module: nn.Module) -> None:
        """Free the weights of a module, except for a head that shares them with the embedding."""
        base: Any = getattr(module, "base_layer", module)  # under a LoRA that is switched off, too
        if is_4bit(base):
            base.weight.quant_state = base.quant_state = None  # the scales
        for parameter in module.parameters():
            if parameter.data_ptr() != self.embed_tokens.weight.data_ptr():
                parameter.data = parameter.data.new_empty(0)

    def _layer(self, index: int) -> StepLayer:
        layer = self.layers[index]
        keys, values = self.kv_cache.keys[index], self.kv_cache.values[index]
        return StepLayer(
            layer.input_norm.data_ptr(),
            layer.post_norm.data_ptr(),
            *(product.structure for product in _products(layer)),
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


def _products(layer: Any) -> tuple[PackedProduct, ...]:
    return layer.query_key_value, layer.output, layer.gate_up, layer.down


def fits(model: LanguageModel) -> bool:
    """True if the operator can run a model: bfloat16 or 4-bit on the CPU, without biases, head norms, sliding window.

    LoRAs may be in float32, as they are trained. They are rounded to the model's bfloat16.
    """
    config = model.config
    head_dim = kv_shape(config)[2]
    sizes = (config.hidden_size, config.intermediate_size, head_dim)
    bases = [base_layer(part) for name, part in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    loras = {parameter for name, parameter in model.named_parameters() if "lora_" in name}
    codes = {base.weight for base in bases if is_4bit(base)}
    return (
        all(parameter.device.type == "cpu" for parameter in model.parameters())
        and all(parameter.dtype == torch.bfloat16 for parameter in {*model.parameters()} - loras - codes)
        and all((type(base) is nn.Linear or is_4bit(base)) and base.bias is None for base in bases)
        and all(size % LANES == 0 for size in sizes)
        and head_dim <= MAX_HEAD_DIM
        and sliding_window(config) is None
        and not has_head_norms(model)
    )
