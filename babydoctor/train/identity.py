"""What a run starts from, by content, and the settings that all of its ranks must share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from babydoctor.config import RunConfig, flat_settings
from babydoctor.model.run_dir import Manifest, read_manifest
from babydoctor.model.weights import local_directory, weight_files


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that all ranks must share: all but those that say where things lie or what rank 0 reports.

    What lies there is compared by content.
    """
    own = (
        "output_dir",
        "tracking",
        "data.rows",
        "data.images",
        "data.num_workers",
        "data.eval_rows",
        "data.eval_images",
    )
    places = (*own, "init_from", "model.language_model", "model.vision_tower")
    return {key: value for key, value in flat_settings(config).items() if not is_below(key, places)}


def identify_start(config: RunConfig, manifest: Manifest) -> dict[str, str]:
    """What a run starts from, by content: base models, and the earlier run that ``init_from`` names."""
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
    """A digest of names, sizes and the first MiB of each file; hashing 13 GB at each start would take a minute."""
    digest = hashlib.sha256(text.encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read(2**20))
    return digest.hexdigest()[:16]


def is_below(key: str, sections: tuple[str, ...]) -> bool:
    """Whether a setting is one of ``sections`` or lies in one."""
    return any(key == section or key.startswith(section + ".") for section in sections)
