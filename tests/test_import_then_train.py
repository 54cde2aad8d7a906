"""Stage 3 directly from a published LLaVA checkpoint: every layout, the lineage, and folders that move."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from babydoctor.config import build_config
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.interop.llava_import import import_llava
from babydoctor.model.run_dir import load_run, read_manifest
from babydoctor.train.loop import train

LAYOUTS = ("llava-pretrain", "llava-golden-lora", "llava-golden-merged", "llava-golden-merged-bin")


def stage_3(settings: dict[str, Any], start: Path, out: Path) -> dict[str, Any]:
    """The radiology stage's settings at this size: 4-bit base, LoRA, trained projector."""
    return settings | {
        "name": "radiology",
        "output_dir": str(out),
        "init_from": str(start),
        "model": {"dtype": "float32", "quantization": "nf4"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "train": settings["train"] | {"max_steps": 2, "save_every": 0},
    }


def answers(run_path: Path) -> list[str]:
    run = load_run(run_path)
    size = run.manifest.image_size
    pixels = np.random.default_rng(0).standard_normal((3, size, size), np.float32)
    query = Query([user_turn("Which side?", has_image=True)], pixels, max_new_tokens=8)
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, [query]) as inference:
        return [inference.answer(query).text]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_import_then_stage_3(golden: Path, tiny_settings: dict[str, Any], tmp_path: Path, layout: str) -> None:
    shutil.copytree(golden, tmp_path / "published", ignore=shutil.ignore_patterns("expected", "images"))
    source = tmp_path / "published" / layout
    import_llava(source, tmp_path / "first" / "imported")
    # Move the folder of the import before the stage.
    start = tmp_path / "imported"
    (tmp_path / "first" / "imported").rename(start)
    imported = read_manifest(start)
    assert [stage.name for stage in imported.lineage] == [f"imported from {source}"]
    run = train(build_config(stage_3(tiny_settings, start, tmp_path / "runs" / "radiology")))
    manifest = read_manifest(run)
    assert [stage.name for stage in manifest.lineage] == [f"imported from {source}", "radiology"]
    assert (manifest.vision_layer, manifest.projector) == (imported.vision_layer, imported.projector)
    assert manifest.base_adapters == (("./base_adapters/0-llava-golden-lora",) if layout.endswith("lora") else ())
    expected = answers(run)

    # Delete it and the folder of a merged checkpoint after the stage, then move the run.
    shutil.rmtree(start)
    if "merged" in layout:
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "published" / "base")
    run.rename(tmp_path / "moved")
    assert answers(tmp_path / "moved") == expected
    manifest_text = (tmp_path / "moved" / "manifest.json").read_text()
    assert str(start) not in json.loads(manifest_text)["language_model"]


def test_a_base_that_cannot_be_linked_is_referenced(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from babydoctor.model.run_dir import adopt_base

    import_llava(golden / "llava-golden-merged", tmp_path / "imported")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "run").mkdir()
    found = adopt_base(tmp_path / "imported", "./language_model", tmp_path / "run")
    assert found == str((tmp_path / "imported" / "language_model").resolve())
    assert list((tmp_path / "run").iterdir()) == [] and "must not be moved" in caplog.text
