"""Describe the model that a stage trains, and write the finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from babydoctor.config import RunConfig
from babydoctor.data.sources import published_versions
from babydoctor.files import atomic_directory
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.run_dir import (
    Manifest,
    Stage,
    adopt_base,
    describe_software,
    read_manifest,
    resolve,
    save_trained,
    write_manifest,
)
from babydoctor.model.weights import local_directory
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import TrainState
from babydoctor.train.output import HISTORY


def prepare_manifest(config: RunConfig) -> tuple[Manifest, Path | None]:
    """Describe the stage's model, and find the projector file that it starts from.

    Returns:
        The manifest of the run, and the projector file of ``init_from``; None without ``init_from``.

    With ``init_from``, the earlier stage's projector continues training and its adapters are merged into the base.
    The adapters are copied into the output directory, so the run does not depend on the earlier one.

    Raises:
        UserError: the earlier run does not fit the configuration.
    """
    run = Path(config.output_dir)
    model = config.model
    if config.init_from is None:
        assert model.language_model and model.vision_tower
        language_model, vision_tower = _absolute(model.language_model), _absolute(model.vision_tower)
        base_adapters: tuple[str, ...] = ()
        lineage: tuple[Stage, ...] = ()
        data_versions: dict[str, str] = {}
        projector, projector_file, vision_layer = model.projector, None, model.vision_layer
    else:
        start = Path(config.init_from)
        before = read_manifest(start)
        language_model = _absolute(resolve(start, before.language_model))
        vision_tower = _absolute(resolve(start, before.vision_tower))
        _check_agrees(config, language_model, vision_tower)
        language_model = adopt_base(start, before.language_model, run)
        vision_tower = adopt_base(start, before.vision_tower, run)
        base_adapters = _copy_adapters(start, before, run)
        lineage, projector, vision_layer = before.lineage, before.projector, before.vision_layer
        data_versions = before.data_versions
        projector_file = start / "projector.safetensors"
    image = ImageSettings.from_processor_dir(local_directory(vision_tower), config.data.image_mode)
    manifest = Manifest(
        name=config.name,
        language_model=language_model,
        vision_tower=vision_tower,
        projector=projector,
        vision_layer=vision_layer,
        template=config.data.template,
        image_size=image.size,
        image_mode=image.mode,
        image_mean=image.mean,
        image_std=image.std,
        max_length=config.data.max_length,
        dtype=model.dtype,
        quantization=model.quantization,
        double_quantization=model.double_quantization,
        base_adapters=base_adapters,
        lineage=lineage,
        data_versions={**data_versions, **published_versions(config.data.rows)},
    )
    return manifest, projector_file


def finish_run(
    run: Path, manifest: Manifest, model: BabyDoctor, state: TrainState, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write projector, adapter and, last, the manifest that marks the run as finished.

    A finished run that was made longer counts as unfinished while its files are replaced.

    Args:
        weights: whole weights of projector and LoRA by their names in ``model``.
    """
    with atomic_directory(run / ".trained") as directory:
        save_trained(model, directory, manifest.language_model, weights)
    (run / "manifest.json").unlink(missing_ok=True)
    for path in (run / ".trained").iterdir():
        target = run / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    (run / ".trained").rmdir()
    history = json.loads((run / HISTORY).read_text(encoding="utf-8"))
    stage = Stage.model_validate(
        {
            "name": manifest.name,
            "steps": state.step,
            "samples": state.samples,
            "data_fingerprint": state.data_fingerprint,
            "resumes": history["resumes"],
        }
    )
    software = describe_software()
    write_manifest(run, manifest.model_copy(update={"lineage": (*manifest.lineage, stage), **software}))


def _absolute(reference: str) -> str:
    """The absolute path of a local directory, so that the run works from any folder, or a hub id unchanged."""
    return str(Path(reference).resolve()) if Path(reference).is_dir() else reference


def _check_agrees(config: RunConfig, language_model: str, vision_tower: str) -> None:
    for key, given, before in (
        ("language_model", config.model.language_model, language_model),
        ("vision_tower", config.model.vision_tower, vision_tower),
    ):
        if given is not None and _absolute(given) != before:
            raise UserError(
                f"model.{key}={given!r}, but init_from={config.init_from!r} was trained on {before!r}; "
                f"leave model.{key} out"
            )


def _copy_adapters(start: Path, before: Manifest, run: Path) -> tuple[str, ...]:
    """Copy the earlier run's adapters into ``run/base_adapters`` and return their references in merging order."""
    sources = [(Path(resolve(start, name)), Path(name).name) for name in before.base_adapters]
    if (start / "adapter").is_dir():
        if before.quantization != "none":
            raise UserError(
                f"init_from={str(start)!r} holds an adapter trained on a 4-bit base, which cannot be merged into the "
                f"float base; write plain weights first: babydoctor merge {start} --out DIR, then init_from: DIR"
            )
        sources.append((start / "adapter", f"{len(sources)}-{before.name}"))
    for source, name in sources:
        target = run / "base_adapters" / name
        if not target.is_dir():
            with atomic_directory(target) as directory:
                shutil.copytree(source, directory, dirs_exist_ok=True)
    return tuple(f"./base_adapters/{name}" for _, name in sources)
