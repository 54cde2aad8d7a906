"""Exports for the original code have its layout, and import as the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.probe import probe_logits
from safetensors.torch import load_file, save_file

from babydoctor.interop.export import export_run
from babydoctor.interop.llava_import import import_llava
from babydoctor.interop.plain import PlainRun
from babydoctor.model.run_dir import load_run, read_manifest, write_manifest
from babydoctor.model.vision import load_vision_tower, patch_features
from babydoctor.schema import UserError


@pytest.fixture(scope="module")
def run(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    import_llava(golden / "llava-golden-lora", out)
    return out


def test_the_layout_equals_the_originals(run: Path, golden: Path, tmp_path: Path) -> None:
    """Same keys, dtypes and shapes as the original's own merge, and the same weights; the same configuration."""
    export_run(run, tmp_path / "llava", format="llava")
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "llava", golden / "llava-golden-merged"))
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-6)
    mine, original = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "llava", golden / "llava-golden-merged")
    )
    mine["mm_vision_tower"] = original["mm_vision_tower"]
    original.pop("transformers_version")
    assert mine == original


@pytest.mark.parametrize("saved_by", [4, 5])
def test_the_original_finds_the_towers_weights(run: Path, tmp_path: Path, saved_by: int) -> None:
    """The names must be those of transformers 4. With other names the original silently starts from random weights."""
    shutil.copytree(run, tmp_path / "run")
    tower = PlainRun(run, read_manifest(run)).tower_directory
    shutil.copytree(tower, tmp_path / "run/tower")
    weights = load_file(tower / "model.safetensors")
    plain = {name.removeprefix("vision_model."): weight for name, weight in weights.items()}
    stored = {("vision_model." if saved_by == 4 else "") + name: weight for name, weight in plain.items()}
    save_file(stored, tmp_path / "run/tower/model.safetensors", {"format": "pt"})
    write_manifest(tmp_path / "run", read_manifest(run).model_copy(update={"vision_tower": "./tower"}))
    export_run(tmp_path / "run", tmp_path / "llava", format="llava")
    exported = load_file(tmp_path / "llava/vision_tower/model.safetensors")
    plain.pop("embeddings.position_ids", None)
    assert exported.keys() == {f"vision_model.{name}" for name in plain}
    assert all(torch.equal(exported[f"vision_model.{name}"], weight) for name, weight in plain.items())
    features = [
        patch_features(load_vision_tower(path, dtype=torch.float32), torch.ones(1, 3, 56, 56))
        for path in (tower, tmp_path / "llava/vision_tower")
    ]
    assert torch.equal(*features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_imports_as_the_same_model(run: Path, tmp_path: Path, dtype: str) -> None:
    export_run(run, tmp_path / "llava", format="llava", dtype=dtype)
    import_llava(tmp_path / "llava", tmp_path / "back")
    before, after = (probe_logits(load_run(path, dtype=torch.float32).model) for path in (run, tmp_path / "back"))
    # Half a unit in the last place of a weight is 2^-9 of it in bfloat16; float16 comes back through bfloat16.
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert (after - before).abs().max() < tolerance * before.abs().max()


def test_an_exported_4_bit_run_answers_the_same(run: Path, tmp_path: Path) -> None:
    """A LoRA trained on NF4 is added to the dequantized base. Earlier LoRAs were merged before quantization."""
    pytest.importorskip("bitsandbytes")
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "adapter", tmp_path / "run" / "base_adapters" / "1-lora")
    manifest = read_manifest(run).model_copy(
        update={"quantization": "nf4", "base_adapters": ("./base_adapters/1-lora",)}
    )
    write_manifest(tmp_path / "run", manifest)
    export_run(tmp_path / "run", tmp_path / "llava", format="llava")
    import_llava(tmp_path / "llava", tmp_path / "back")
    before, after = (probe_logits(load_run(tmp_path / name).model) for name in ("run", "back"))
    assert (after - before).abs().max() < 1e-4
    assert (before - probe_logits(load_run(run).model)).abs().max() > 0.05  # NF4 does change it


def test_wrong_arguments_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'onnx' is not one of hf, llava, gguf"):
        export_run(run, tmp_path / "out", format="onnx")
    with pytest.raises(UserError, match="int8"):
        export_run(run, tmp_path / "out", format="llava", dtype="int8")
    with pytest.raises(UserError, match="exists already"):
        export_run(run, tmp_path, format="llava")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        export_run(tmp_path, tmp_path / "out", format="llava")
    assert not (tmp_path / "out").exists()
