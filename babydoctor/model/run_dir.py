"""The run directory: a stage writes it; the next stage, evaluation and serving read it.

::

    run/
      manifest.json            parts of the model, where they come from, how it was trained
      config.yaml              the resolved configuration of the stage
      projector.safetensors
      adapter/                 the stage's LoRA in peft's format (absent if it trained none)
      base_adapters/N-name/    LoRAs of earlier stages, merged into the base on loading
      familiarity.safetensors  points of the training images, after `babydoctor eval RUN --familiarity`
      language_model/ vision_tower/   plain weights, after `babydoctor merge` and `babydoctor import`
      metrics.jsonl tensorboard/ checkpoints/step-N/

A directory with its final name is complete: it is written under a temporary name, flushed to disk and renamed.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from babydoctor import __version__
from babydoctor.conversation import get_template
from babydoctor.data.template_tokens import RETRAIN, check_template
from babydoctor.data.tokens import load_tokenizer
from babydoctor.files import atomic_directory, check_readable, write_text
from babydoctor.hub import model_commit
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.language_model import load_language_model
from babydoctor.model.lora import has_lora, load_lora, save_lora
from babydoctor.model.nf4 import Quantization
from babydoctor.model.tensor_files import load_tensors, save_tensors
from babydoctor.model.vision import build_projector, load_vision_tower
from babydoctor.model.weights import read_end_tokens
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 1


class Stage(BaseModel):
    """One entry of a run's lineage."""

    model_config = ConfigDict(extra="allow")

    name: str
    steps: int
    samples: int
    data_fingerprint: str


class Manifest(BaseModel):
    """``manifest.json``: everything that is needed to load the run, and its origin.

    Paths that begin with ``./`` are relative to the run directory.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    format: int = FORMAT
    name: str
    language_model: str
    vision_tower: str
    projector: Literal["linear", "mlp2x_gelu"] = "linear"
    vision_layer: int = -2
    template: str
    image_size: int
    image_mode: Literal["square", "pad"]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    max_length: int = 2048
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Literal["none", "nf4"] = "none"
    double_quantization: bool = True
    base_adapters: tuple[str, ...] = ()
    lineage: tuple[Stage, ...] = ()
    versions: dict[str, str] = {}
    git_commit: str | None = None
    hub_commits: dict[str, str] = {}
    """Hub id of the language model and the vision tower -> the commit that was used."""
    data_versions: dict[str, str] = {}
    """Published data set that rows of any stage come from -> the commit on the hub."""
    localization: dict[str, Any] | None = None
    """How often the peak of an occlusion map is on the finding, measured by ``eval --localization``."""
    familiarity: dict[str, Any] | None = None
    """How well the run notices unfamiliar images, measured by ``eval --familiarity``."""
    confidence: dict[str, Any] | None = None
    """Temperature and calibration of token probabilities, measured by ``eval --confidence``."""

    @property
    def image(self) -> ImageSettings:
        """How images become pixels for this run."""
        return ImageSettings(size=self.image_size, mode=self.image_mode, mean=self.image_mean, std=self.image_std)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Run:
    """A loaded run directory."""

    path: Path
    model: BabyDoctor
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest


def read_manifest(run: str | Path) -> Manifest:
    """Read a run directory's manifest.

    Raises:
        UserError: the directory is not a run, or has a newer format.
    """
    path = Path(run) / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{run} is not a run directory: it has no manifest.json. `babydoctor train` writes one; an original "
            "LLaVA checkpoint becomes one with `babydoctor import`."
        )
    check_readable(path)
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {error}; copy the run again") from error
    if manifest.format > FORMAT:
        raise UserError(f"{path} has format {manifest.format}, this version reads up to {FORMAT}; update babydoctor")
    return manifest


def build_model(
    manifest: Manifest,
    run: Path,
    *,
    projector: Path | None,
    adapter: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> BabyDoctor:
    """Build the model that a manifest describes. No parameter requires gradients.

    Args:
        run: the run directory that the manifest's ``./`` paths are relative to.
        projector: safetensors file with its weights; None: it is freshly initialized.
        adapter: peft LoRA directory to attach for inference.
        dtype: the precision to compute in; None: the manifest's. Weights are rounded to the manifest's in both cases.
    """
    dtype = dtype or manifest.torch_dtype
    language_model = load_language_model(
        resolve(run, manifest.language_model),
        dtype=manifest.torch_dtype,
        compute_dtype=dtype,
        device=device,
        quantization=Quantization(manifest.double_quantization) if manifest.quantization == "nf4" else None,
        merge_adapters=[Path(resolve(run, base_adapter)) for base_adapter in manifest.base_adapters],
    )
    if (ends := read_end_tokens(resolve(run, manifest.language_model))) is not None:
        language_model.generation_config.eos_token_id = ends
    vision = load_vision_tower(resolve(run, manifest.vision_tower), dtype=dtype, device=device)
    layers = build_projector(manifest.projector, vision.config.hidden_size, language_model.config.hidden_size)
    if projector is not None:
        load_projector(layers, projector)
    layers.to(device, dtype).requires_grad_(False)
    if adapter is not None:
        load_lora(language_model, adapter)
    return BabyDoctor(vision, layers, language_model, vision_layer=manifest.vision_layer).eval()


def load_run(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Run:
    """Load a run directory for inference.

    Args:
        dtype: replaces the manifest's, for example float32 to compare logits.

    Raises:
        UserError: the run or a model below it is missing or damaged, or the tokenizer lacks the template's tokens.
    """
    path = Path(path)
    manifest = read_manifest(path)
    language_model = resolve(path, manifest.language_model)
    tokenizer = load_tokenizer(language_model)
    check_template(get_template(manifest.template), tokenizer, language_model, fix=RETRAIN)
    adapter = path / "adapter"
    model = build_model(
        manifest,
        path,
        projector=path / "projector.safetensors",
        adapter=adapter if adapter.is_dir() else None,
        device=device,
        dtype=dtype,
    )
    return Run(path, model, tokenizer, manifest)


def resolve(run: Path, reference: str) -> str:
    """The directory or hub id of a base model; ``./x`` is relative to the run."""
    return str(run / reference[2:]) if reference.startswith("./") else reference


def load_projector(projector: torch.nn.Module, path: Path) -> None:
    """Load the weights of a projector from a safetensors file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the run was not finished or not copied completely")
    try:
        projector.load_state_dict(load_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {error}") from error


def save_trained(
    model: BabyDoctor, directory: Path, base: str, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write what training changed: the projector and the LoRA adapter, if there is one.

    Args:
        weights: projector and LoRA by their names in ``model``, where the model itself holds shares of them only.
    """
    weights = weights or dict(model.named_parameters())
    projector = {name.removeprefix("projector."): x for name, x in weights.items() if name.startswith("projector.")}
    state = {name: value.detach().contiguous().cpu() for name, value in projector.items()}
    save_tensors(state, directory / "projector.safetensors")
    if has_lora(model.language_model):
        prefix = "language_model."
        lora = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        save_lora(model.language_model, directory / "adapter", base, lora)


def adopt_base(start: Path, reference: str, run: Path) -> str:
    """Add a base model that is part of the run ``start`` (``./language_model``) to ``run`` as well, by hard links.

    The links take no space, and ``run`` stays complete when ``start`` is moved or deleted. If the file system does not
    support hard links, the base stays in ``start``.

    Returns:
        The full path of the base, or the reference of one that is not in ``start``.
    """
    source = Path(resolve(start, reference))
    if not source.is_dir():
        return str(source.resolve()) if reference.startswith("./") else reference
    if not reference.startswith("./"):
        return str(source.resolve())
    target = run / reference[2:]
    if not target.is_dir():
        try:
            with atomic_directory(target) as directory:
                for file in source.iterdir():
                    (directory / file.name).hardlink_to(file.resolve())
        except OSError as error:
            logger.warning("%s stays in %s, which must not be moved: %s", source.name, start.resolve(), error)
            return str(source.resolve())
    return str(target.resolve())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``.

    References to base models inside the run are written relative to it, so that the run can be moved. For each model
    from the hub the commit is recorded.
    """
    bases = {name: getattr(manifest, name) for name in ("language_model", "vision_tower")}
    found = {base: model_commit(base) for base in bases.values()}
    commits = {**manifest.hub_commits, **{base: commit for base, commit in found.items() if commit}}
    root = directory.resolve()
    relative = {
        name: f"./{Path(base).relative_to(root)}" for name, base in bases.items() if Path(base).is_relative_to(root)
    }
    manifest = manifest.model_copy(update={**relative, "hub_commits": commits})
    write_text(directory / "manifest.json", manifest.model_dump_json(indent=2) + "\n")


def describe_software() -> dict[str, Any]:
    """Versions and git commit for a manifest."""
    versions = {"babydoctor": __version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"versions": versions, "git_commit": commit}
