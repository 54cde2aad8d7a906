"""Load a language model weight by weight, merge the LoRAs of earlier stages, and quantize to 4 bits.

Only the linear layers of the decoder are quantized or get a LoRA, never ``lm_head``, embeddings or norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from babydoctor.model.families import DECODERS, LanguageConfig, LanguageModel, build_causal_lm, load_language_config
from babydoctor.model.lora import LoraUpdate
from babydoctor.model.nf4 import Quantization, quantize_linear
from babydoctor.model.weights import WeightReader, local_directory
from babydoctor.progress import ByteProgress
from babydoctor.schema import UserError


def build_language_model(config: LanguageConfig, dtype: torch.dtype) -> LanguageModel:
    """Build a language model on the meta device: shapes only, no memory."""
    with torch.device("meta"):
        model = build_causal_lm(config, dtype)
    return model.requires_grad_(False)


class LanguageWeights:
    """Reads the weights of a language model on disk one at a time and merges the LoRAs of earlier stages.

    Attributes:
        shapes: the shape of each weight by its name in transformers, in file order. A tied ``lm_head`` is not
            listed.

    Raises:
        UserError: weights are missing, unknown or of the wrong shape, or an adapter does not fit. This is
            checked before the first weight is read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        merge_adapters: Sequence[Path] = (),
    ) -> None:
        """``dtype`` and ``merge_adapters`` as in ``load_language_model``."""
        self.directory = local_directory(path)
        self.config = load_language_config(path)
        self.dtype = dtype
        self.device = torch.device(device)
        self.reader = WeightReader(self.directory)
        self.updates = [LoraUpdate(adapter) for adapter in merge_adapters]
        self.shapes = self._check_names()
        for update in self.updates:
            update.check_fits(self.shapes)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight with its name, file by file."""
        for name in self.shapes:
            yield name, self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """Read a weight, add the adapters' updates in float32, and round it to ``dtype``."""
        weight = self.reader.read(name).to(self.device)
        for update in self.updates:
            weight = update.apply(name.removesuffix(".weight"), weight)
        return weight.to(self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights in ``dtype``."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * self.dtype.itemsize

    def _check_names(self) -> dict[str, tuple[int, ...]]:
        tied = bool(self.config.tie_word_embeddings)
        expected = {
            name: tuple(p.shape) for name, p in build_language_model(self.config, self.dtype).named_parameters()
        }
        if tied:
            expected.pop("lm_head.weight", None)
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.reader.files:
            if name not in expected:
                # Old releases saved this buffer; some checkpoints save a tied lm_head.
                if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                    continue
                raise UserError(
                    f"{self.directory} holds an unknown weight {name!r}; is it a plain "
                    f"{DECODERS[self.config.model_type]}?"
                )
            shapes[name] = self.reader.shape(name)
            if shapes[name] != expected[name]:
                raise UserError(
                    f"{self.directory}: weight {name!r} has the shape {shapes[name]}, but config.json requires "
                    f"{expected[name]}"
                )
        if missing := [name for name in expected if name not in shapes]:
            raise UserError(f"{self.directory} lacks {len(missing)} weights, the first is {missing[0]!r}")
        return shapes


def load_language_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    merge_adapters: Sequence[Path] = (),
) -> LanguageModel:
    """Load a language model. Each weight is read, merged, cast and quantized before the next one is read.

    At most one float weight exists besides the model, so a 7B model in NF4 needs its 4-bit size and one matrix.

    Args:
        dtype: the precision that weights are rounded to, and quantized from.
        compute_dtype: the precision that they are stored in after that; None: ``dtype``.
        merge_adapters: peft LoRA directories, merged in this order in float32 before the cast to ``dtype``.

    Raises:
        UserError: weights are missing, unknown or of the wrong shape; an adapter does not fit.
    """
    weights = LanguageWeights(path, dtype=dtype, device=device, merge_adapters=merge_adapters)
    model = build_language_model(weights.config, compute_dtype or dtype)
    verb = "Quantizing" if quantization else "Loading"
    with ByteProgress(f"{verb} the language model", weights.num_bytes) as progress:
        for name, weight in weights:
            place_weight(model, name, weight, quantization)
            progress.advance(weight.nbytes)
    if weights.config.tie_word_embeddings:
        model.tie_weights()
    return finish_language_model(model, device)


def finish_language_model(model: LanguageModel, device: str | torch.device) -> LanguageModel:
    """Compute the rotary embedding, which checkpoints do not store, and switch to evaluation mode."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval().requires_grad_(False)


def place_weight(
    model: LanguageModel, name: str, weight: torch.Tensor, quantization: Quantization | None = None
) -> None:
    """Set one weight of a model that was built on the meta device. It keeps its device and gets the model's dtype."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    weight = weight.to(model.dtype)
    if quantization and parameter_name == "weight" and is_decoder_linear(module_name, module):
        layer = quantize_linear(weight, quantization)
        layer.bias = module.bias  # read before or after the weight
        model.set_submodule(module_name, layer)
    else:
        setattr(module, parameter_name, nn.Parameter(weight, requires_grad=False))


def is_decoder_linear(name: str, module: nn.Module) -> bool:
    """True if this module of the language model may be quantized or get a LoRA."""
    return isinstance(module, nn.Linear) and name.startswith("model.layers.")
