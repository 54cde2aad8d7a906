"""The language model of a run as plain weights, read one at a time without building the model.

Each weight is read from the base, merged with the LoRAs of earlier stages, and rounded to the run's precision. In a
4-bit run it is also quantized and dequantized, because the run's own LoRA was trained on the result. Then the run's own
LoRA is merged. ``merge`` and every export read weights from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from babydoctor.model.language_model import LanguageWeights, build_language_model, is_decoder_linear
from babydoctor.model.lora import LoraUpdate
from babydoctor.model.nf4 import Quantization, dequantized_weight, quantize_linear
from babydoctor.model.run_dir import Manifest, resolve


class RunWeights:
    """Weights of a run by their names in transformers.

    Attributes:
        shapes: the shape of each weight; a tied ``lm_head`` is not listed.
        update: the run's own LoRA, or None.

    Raises:
        UserError: the base is incomplete or an adapter does not fit it.
    """

    def __init__(self, path: Path, manifest: Manifest, *, device: str | torch.device = "cpu") -> None:
        adapters = [Path(resolve(path, adapter)) for adapter in manifest.base_adapters]
        self.source = LanguageWeights(
            resolve(path, manifest.language_model),
            dtype=manifest.torch_dtype,
            device=device,
            merge_adapters=adapters,
        )
        self.config = self.source.config
        self.shapes = self.source.shapes
        self.update = LoraUpdate(path / "adapter") if (path / "adapter").is_dir() else None
        if self.update is not None:
            self.update.check_fits(self.shapes)
        self._quantization = Quantization(manifest.double_quantization) if manifest.quantization == "nf4" else None
        self._model = build_language_model(self.config, manifest.torch_dtype)

    @property
    def architecture(self) -> str:
        """The name of transformers' class."""
        return type(self._model).__name__

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each merged weight with its name, file by file: float32 with a LoRA, else in the run's precision."""
        for name in self.shapes:
            yield name, self.merge(name, self.read_base(name))

    def read_base(self, name: str) -> torch.Tensor:
        """The weight of the run without its own LoRA."""
        weight = self.source.read(name)
        module, _, part = name.rpartition(".")
        if self._quantization and part == "weight" and is_decoder_linear(module, self._model.get_submodule(module)):
            weight = dequantized_weight(quantize_linear(weight, self._quantization))
        return weight

    def merge(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """``base`` with the run's own LoRA added: float32 if there is one for it, else ``base`` itself."""
        return base if self.update is None else self.update.apply(name.removesuffix(".weight"), base)
