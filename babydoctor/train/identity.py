"""Identify what a run starts from by content, and select the settings that all of its ranks must share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from babydoctor.config import RunConfig, flat_settings
from babydoctor.model.run_dir import Manifest, read_manifest
from babydoctor.model.weights import local_directory, weight_files


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that all ranks must share.

    Left out are paths, whose content is compared instead, and what only rank 0 uses.
    """
    excluded = (
        "output_dir",
        "tracking",
        "data.rows",
        "data.images",
        "data.num_workers",
        "data.eval_rows",
        "data.eval_images",
        "init_from",
        "model.language_model",
        "model.vision_tower",
    )
    return {key: value for key, value in flat_settings(config).items() if not is_below(key, excluded)}


def identify_start(config: RunConfig, manifest: Manifest) -> dict[str, str]:
    """Digests of what a run starts from: the base models, and the earlier run in ``init_from``."""
    identity = {
        "language_model": _identify_files(_model_files(local_directory(manifest.language_model))),
        "vision_tower": _identify_files(_model_files(local_directory(manifest.vision_tower))),
    }
    if config.init_from is not None:
        start = Path(config.init_from)
        files = [start / "projector.safetensors", *sorted((start / "adapter").glob("*.safetensors"))]
        lineage = [stage.model_dump() for stage in read_manifest(start).lineage]
        identity["init_from"] = _identify_files(files, json.dumps(lineage, sort_keys=True))
    return identity


def _model_files(directory: Path) -> list[Path]:
    return [directory / "config.json", *weight_files(directory)]


def _identify_files(files: list[Path], text: str = "") -> str:
    """A digest of the name, the size and the first MiB of each file. Hashing all 13 GB would take a minute."""
    digest = hashlib.sha256(text.encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read(2**20))
    return digest.hexdigest()[:16]


def is_below(key: str, sections: tuple[str, ...]) -> bool:
    """True if a setting is one of ``sections`` or belongs to one."""
    return any(key == section or key.startswith(section + ".") for section in sections)
