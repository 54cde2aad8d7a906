"""Read a run directory without building the model, for every export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from babydoctor.conversation import get_template
from babydoctor.data.template_tokens import RETRAIN, check_template, end_token_ids
from babydoctor.data.tokens import load_tokenizer
from babydoctor.model.families import LanguageConfig, VisionConfig, load_language_config, load_vision_config
from babydoctor.model.run_dir import Manifest, read_manifest, resolve
from babydoctor.model.run_weights import RunWeights
from babydoctor.model.tensor_files import load_tensors
from babydoctor.model.vision import num_patches
from babydoctor.model.weights import WeightReader, local_directory, read_end_tokens
from babydoctor.progress import ByteProgress
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlainRun:
    """A run directory whose weights are read one at a time."""

    path: Path
    manifest: Manifest

    @cached_property
    def language_directory(self) -> Path:
        return local_directory(resolve(self.path, self.manifest.language_model))

    @cached_property
    def tower_directory(self) -> Path:
        return local_directory(resolve(self.path, self.manifest.vision_tower))

    @cached_property
    def language_config(self) -> LanguageConfig:
        return load_language_config(self.language_directory)

    @cached_property
    def vision_config(self) -> VisionConfig:
        return load_vision_config(self.tower_directory)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.language_directory)
        check_template(get_template(self.manifest.template), tokenizer, str(self.language_directory), fix=RETRAIN)
        return tokenizer

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end an answer, as in the engine: the template's first, the tokenizer's, the base's."""
        template = get_template(self.manifest.template)
        base = read_end_tokens(self.language_directory) or getattr(self.language_config, "eos_token_id", None) or []
        ids = [*sorted(end_token_ids(template, self.tokenizer)), self.tokenizer.eos_token_id]
        return list(dict.fromkeys([*ids, *(base if isinstance(base, list) else [base])]))

    @property
    def generation_tokens(self) -> dict[str, Any]:
        """``generation_config.json``'s keys of the tokens that begin a text and end an answer."""
        ends = self.end_token_ids
        return {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}

    @property
    def num_patches(self) -> int:
        return num_patches(self.vision_config)

    @property
    def adapter(self) -> Path | None:
        return self.path / "adapter" if (self.path / "adapter").is_dir() else None

    def language_weights(self, description: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight of the language model by its name in transformers, a tied ``lm_head`` included.

        Float32 if a LoRA was added, else the run's precision.

        Args:
            description: label of the progress display.

        Raises:
            UserError: the base is incomplete or an adapter does not fit it.
        """
        with ByteProgress(description, self._run_weights.source.num_bytes) as progress:
            for name, weight in self._run_weights:
                yield name, weight
                if name == "model.embed_tokens.weight" and self.language_config.tie_word_embeddings:
                    yield "lm_head.weight", weight
                progress.advance(weight.numel() * self.manifest.torch_dtype.itemsize)

    def language_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of ``language_weights``, in its order; nothing is read."""
        for name, shape in self._run_weights.shapes.items():
            yield name, shape
            if name == "model.embed_tokens.weight" and self.language_config.tie_word_embeddings:
                yield "lm_head.weight", shape

    @cached_property
    def _run_weights(self) -> RunWeights:
        return RunWeights(self.path, self.manifest)

    def tower_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight of the tower by its name below ``vision_model.``, as in files of transformers."""
        for name, weight in WeightReader(self.tower_directory):
            plain = name.removeprefix("vision_model.")
            known = plain.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."))
            if known and not plain.endswith("position_ids"):
                yield plain, weight

    def projector_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of ``projector.safetensors``: ``weight`` and ``bias``, or ``0.*`` and ``2.*`` of an MLP."""
        path = self.path / "projector.safetensors"
        if not path.is_file():
            raise UserError(f"{path} is missing; the run was not finished or not copied completely")
        return load_tensors(path)

    def mlp_projector(self) -> dict[str, torch.Tensor]:
        """The projector as LLaVA-1.5's two layers, ``0.weight 0.bias 2.weight 2.bias``, float32.

        A linear projector is written exactly, by the identity gelu(x) - gelu(-x) = x: the first layer is [I; -I; 0],
        the second [W, -W, 0] with the bias of W.

        Raises:
            UserError: the hidden size of the language model is below twice that of the tower, so x and -x do not fit.
        """
        weights = {name: weight.float() for name, weight in self.projector_weights().items()}
        if self.manifest.projector != "linear":
            return weights
        text, vision = weights["weight"].shape
        if text < 2 * vision:
            raise UserError(
                f"{self.path}: a linear projector becomes LLaVA-1.5's MLP only if the text width ({text}) is at "
                f"least twice the vision width ({vision}); train with model.projector: mlp2x_gelu to export this pair"
            )
        identity = torch.eye(vision)
        first, second = torch.zeros(text, vision), torch.zeros(text, text)
        first[:vision], first[vision : 2 * vision] = identity, -identity
        second[:, :vision], second[:, vision : 2 * vision] = weights["weight"], -weights["weight"]
        return {"0.weight": first, "0.bias": torch.zeros(text), "2.weight": second, "2.bias": weights["bias"]}

    def language_config_values(self) -> dict[str, Any]:
        """``config.json`` of the language model, as stored."""
        values = json.loads((self.language_directory / "config.json").read_text(encoding="utf-8"))
        for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
            values.pop(key, None)
        return values


def open_plain(path: Path) -> PlainRun:
    """Read a run's manifest and check that its parts are there.

    Raises:
        UserError: it is not a run directory.
    """
    run = PlainRun(path, read_manifest(path))
    _ = run.language_config, run.vision_config
    return run
