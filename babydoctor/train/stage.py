"""A stage's run directory: made before training, checked before resuming, finished at the end."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from babydoctor.config import RunConfig, differences, dump_config, load_config
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.run_dir import (
    Manifest,
    Stage,
    atomic_directory,
    describe_software,
    read_manifest,
    resolve,
    save_trained,
    write_manifest,
    write_text,
)
from babydoctor.model.weights import local_directory
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import list_snapshots

logger = logging.getLogger(__name__)

# Settings that change nothing about what is learnt, so that a run may be resumed with others.
_FREE_TO_CHANGE = (
    *("data.num_workers", "tracking.", "eval.", "eval:"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints"),
)


def prepare_output(config: RunConfig, *, resume: bool) -> Path | None:
    """Make or check the output directory; return the checkpoint to go on from, if any.

    Raises:
        UserError: it holds a run and ``resume`` is off, or the run was made with another configuration.
    """
    run = Path(config.output_dir)
    written = run / "config.yaml"
    if not written.is_file():
        if run.exists() and any(run.iterdir()):
            raise UserError(f"output_dir={config.output_dir!r} is not empty and holds no run; choose another")
        run.mkdir(parents=True, exist_ok=True)
        write_text(written, dump_config(config))
        return None
    if not resume:
        raise UserError(
            f"output_dir={config.output_dir!r} holds a run already; go on with it by --resume, "
            "or choose another output_dir, or delete it"
        )
    changed = [d for d in differences(load_config(written), config) if not d.startswith(_FREE_TO_CHANGE)]
    if changed:
        raise UserError(
            f"{run} was begun with another configuration and is not resumed, since the result would be neither's:\n  "
            + "\n  ".join(changed)
            + f"\nSet these back (the run's own are in {written}) or choose another output_dir."
        )
    snapshots = list_snapshots(run)
    if not snapshots:
        logger.info("%s has no checkpoint yet; it begins anew", run)
    return snapshots[-1] if snapshots else None


def is_finished(run: Path) -> bool:
    """Whether a stage ran to its end: the manifest is written last."""
    return (run / "manifest.json").is_file()


def prepare_manifest(config: RunConfig) -> tuple[Manifest, Path | None]:
    """What the stage's model is made of, and the projector file it starts from.

    With ``init_from``, the earlier stage's projector goes on training, and its adapters are merged into the base;
    they are copied into the output directory, so that a run needs nothing of the one before.

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
        projector, projector_file, vision_layer = model.projector, None, model.vision_layer
    else:
        start = Path(config.init_from)
        before = read_manifest(start)
        language_model = _absolute(resolve(start, before.language_model))
        vision_tower = _absolute(resolve(start, before.vision_tower))
        _check_agrees(config, language_model, vision_tower)
        base_adapters = _copy_adapters(start, before, run)
        lineage, projector, vision_layer = before.lineage, before.projector, before.vision_layer
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
    )
    return manifest, projector_file


def finish_run(run: Path, manifest: Manifest, model: BabyDoctor, stage: Stage) -> None:
    """Write projector, adapter and, last of all, the manifest."""
    with atomic_directory(run / ".trained") as directory:
        save_trained(model, directory, manifest.language_model)
    for path in (run / ".trained").iterdir():
        target = run / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    (run / ".trained").rmdir()
    software = describe_software()
    write_manifest(run, manifest.model_copy(update={"lineage": (*manifest.lineage, stage), **software}))


def _absolute(reference: str) -> str:
    """A local directory by its full path, so that the run works from anywhere; a hub id as it is."""
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
    """Copy the earlier run's adapters into ``run/base_adapters`` and name them in the order of merging."""
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
