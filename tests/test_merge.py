"""``babydoctor merge``: one layer at a time, the same model, continues after a failure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.probe import probe_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from babydoctor.config import LoraConfig
from babydoctor.interop.export import export_run
from babydoctor.interop.llava_import import import_llava
from babydoctor.model import merge, weights
from babydoctor.model.layer_probe import LayerProbe, group_by_layer
from babydoctor.model.lora import LoraUpdate, add_lora, lora_layers, save_lora
from babydoctor.model.merge import merge_run
from babydoctor.model.run_dir import load_run, read_manifest, write_manifest
from babydoctor.model.tensor_files import save_tensors
from babydoctor.model.weights import ShardWriter, WeightReader
from babydoctor.schema import UserError

NUM_LAYERS = 4
TINY_SHARD = 4096


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32, a bfloat16 and a 4-bit run on a base of four layers in many shards, each with two LoRAs."""
    folder = tmp_path_factory.mktemp("merge")
    config = LlamaConfig.from_pretrained(tiny_base / "llama")
    config.num_hidden_layers = NUM_LAYERS
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    shutil.copytree(tiny_base / "llama", folder / "llama", ignore=shutil.ignore_patterns("*.safetensors"))
    base.save_pretrained(folder / "llama", max_shard_size="100KB")
    assert len(list((folder / "llama").glob("*.safetensors"))) > 5
    for seed, name in ((1, "earlier"), (2, "own")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
        add_lora(model, LoraConfig(r=4, alpha=8, dropout=0.0))
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        save_lora(model, folder / name, str(folder / "llama"))
    for name, changes in {
        "float32": {},
        "bfloat16": {"dtype": "bfloat16"},
        "nf4": {"quantization": "nf4", "dtype": "bfloat16"},
    }.items():
        (folder / name).mkdir()
        shutil.copy2(tiny_run / "projector.safetensors", folder / name)
        shutil.copytree(folder / "own", folder / name / "adapter")
        shutil.copytree(folder / "earlier", folder / name / "base_adapters" / "0-earlier")
        values = {"language_model": str(folder / "llama"), "base_adapters": ("./base_adapters/0-earlier",), **changes}
        write_manifest(folder / name, read_manifest(tiny_run).model_copy(update=values))
    return {name: folder / name for name in ("float32", "bfloat16", "nf4")}


@pytest.mark.parametrize("shard_bytes", [TINY_SHARD, 2**30], ids=["many shards", "one shard"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "nf4"])
def test_a_merged_run_answers_like_the_run(runs: dict[str, Path], tmp_path: Path, name: str, shard_bytes: int) -> None:
    report = merge_run(runs[name], tmp_path / "merged", dtype=torch.float32, shard_bytes=shard_bytes)
    assert report.difference < 1e-4 * report.scale
    shards = sorted(file.name for file in (tmp_path / "merged" / "language_model").glob("*.safetensors"))
    parts = NUM_LAYERS + 2
    expected = ["model.safetensors"]
    if shard_bytes == TINY_SHARD:  # a shard ends with the layer that fills it
        expected = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    assert shards == expected
    before, after = (
        probe_logits(load_run(path, dtype=torch.float32).model) for path in (runs[name], tmp_path / "merged")
    )
    # The 4-bit run computes with its dequantized weights rounded to bfloat16; loaded in float32 it does not round them.
    assert (after - before).abs().max() < (0.02 if name == "nf4" else 1e-4) * before.abs().max()
    assert not list(tmp_path.glob("*.partial"))
    assert not list((tmp_path / "merged").rglob("merge*"))
    manifest = read_manifest(tmp_path / "merged")
    assert (manifest.quantization, manifest.base_adapters, manifest.dtype) == ("none", (), "float32")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "merged" / "language_model", dtype=torch.float32)
    assert stock.config.num_hidden_layers == NUM_LAYERS


def test_each_weight_is_written_once_under_its_plain_name(runs: dict[str, Path], tmp_path: Path) -> None:
    merge_run(runs["bfloat16"], tmp_path / "merged", shard_bytes=TINY_SHARD)
    names = []
    for file in (tmp_path / "merged" / "language_model").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            names += list(shard.keys())
    base = read_manifest(runs["bfloat16"]).language_model
    assert sorted(names) == sorted(WeightReader(Path(base)).files)


def test_tied_embeddings_stay_tied(runs: dict[str, Path], tmp_path: Path) -> None:
    manifest = read_manifest(runs["float32"])
    base, run = tmp_path / "llama", tmp_path / "run"
    shutil.copytree(manifest.language_model, base, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base, max_shard_size="100KB")
    shutil.copytree(runs["float32"], run)
    write_manifest(run, manifest.model_copy(update={"language_model": str(base)}))
    merge_run(run, tmp_path / "merged", shard_bytes=TINY_SHARD)
    before, after = (probe_logits(load_run(path).model) for path in (run, tmp_path / "merged"))
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["float32", "nf4"])
def test_an_interrupted_merge_continues(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Interrupt while each part is written. The result is byte for byte that of an uninterrupted merge."""
    merge_run(runs[name], tmp_path / "whole", shard_bytes=TINY_SHARD)
    write = ShardWriter.write
    written: list[str] = []

    def write_until_next_layer(self: ShardWriter, weight: str, tensor: torch.Tensor) -> None:
        if weight.endswith("input_layernorm.weight"):
            if written:
                raise Interrupted
            written.append(weight)
        write(self, weight, tensor)

    monkeypatch.setattr(ShardWriter, "write", write_until_next_layer)
    attempts = 0
    while not (tmp_path / "merged").exists():
        attempts += 1
        written.clear()
        try:
            merge_run(runs[name], tmp_path / "merged", shard_bytes=TINY_SHARD)
        except Interrupted:
            assert (tmp_path / "merged.partial").is_dir()
        assert attempts <= NUM_LAYERS
    assert attempts == NUM_LAYERS
    files = [file for file in (tmp_path / "whole").rglob("*") if file.is_file()]
    assert {f.relative_to(tmp_path / "whole") for f in files} == {
        f.relative_to(tmp_path / "merged") for f in (tmp_path / "merged").rglob("*") if f.is_file()
    }
    for file in files:
        assert file.read_bytes() == (tmp_path / "merged" / file.relative_to(tmp_path / "whole")).read_bytes(), file


def test_a_killed_merge_continues(runs: dict[str, Path], tmp_path: Path) -> None:
    """kill -9 after the third part was recorded."""
    program = (
        "import os, signal, sys, pathlib\n"
        "from babydoctor.model import merge\n"
        "record = merge._Merge._record\n"
        "def die(self, num_done, *rest):\n"
        "    record(self, num_done, *rest)\n"
        "    if num_done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge._Merge._record = die\n"
        f"merge.merge_run(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), shard_bytes={TINY_SHARD})\n"
    )
    command = [sys.executable, "-c", program, runs["float32"], tmp_path / "merged"]
    assert subprocess.run(command, capture_output=True).returncode == -9
    state = json.loads((tmp_path / "merged.partial" / "merge.json").read_text())
    assert state["num_done"] == 3
    stamps = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "merged.partial" / "language_model").glob(".shard-*")
    }
    assert len(stamps) == 3
    merge_run(runs["float32"], tmp_path / "merged", shard_bytes=TINY_SHARD)
    kept = {file.stat().st_mtime_ns for file in (tmp_path / "merged" / "language_model").glob("*.safetensors")}
    assert set(stamps.values()) < kept  # the finished shards were not written again


def test_an_unfinished_merge_of_another_run_is_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(merge._Merge, "compare", fail)
    with pytest.raises(Interrupted):
        merge_run(runs["float32"], tmp_path / "merged")
    for run, options in ((runs["bfloat16"], {}), (runs["float32"], {"dtype": torch.bfloat16})):
        with pytest.raises(UserError, match=r"merged\.partial holds an unfinished merge of another run.*delete it"):
            merge_run(run, tmp_path / "merged", **options)
    monkeypatch.undo()
    merge_run(runs["float32"], tmp_path / "merged")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("not ours")
    with pytest.raises(UserError, match=r"other\.partial exists and is not an unfinished merge"):
        merge_run(runs["float32"], tmp_path / "other")
    assert (tmp_path / "other.partial" / "thesis.txt").exists()


def test_a_write_error_is_explained_and_the_next_try_continues(runs: dict[str, Path], tmp_path: Path) -> None:
    """A limit on file sizes simulates a full disk: the third shard exceeds it."""
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from babydoctor.cli.main import main\n"
        "from babydoctor.model import merge\n"
        "merge.merge_run.__kwdefaults__['shard_bytes'] = 2**62\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
        "sys.argv = ['babydoctor', 'merge', sys.argv[1], '--out', sys.argv[2]]\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, runs["float32"], tmp_path / "merged"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "the file exceeds the size limit" in result.stderr and "run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "merged.partial" / "language_model").glob(".shard-*"))  # no partial file is left
    assert not (tmp_path / "merged").exists()


def test_missing_space_is_named_before_anything_is_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"merging takes .* GB in .*0\.0 GB are free; free some space"):
        merge_run(runs["float32"], tmp_path / "merged")


def test_wrong_weights_are_refused_and_deleted(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that changes on its way to the disk changes the logits."""
    write = ShardWriter.write

    def damage(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, -tensor if name == "model.layers.1.mlp.up_proj.weight" else tensor)

    monkeypatch.setattr(ShardWriter, "write", damage)
    with pytest.raises(UserError, match="do not match"):
        merge_run(runs["float32"], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_small_weights_that_are_kept_do_not_keep_the_file_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 2**21)
    tensors = {}
    for layer in range(6):
        tensors[f"{layer}.projection"] = torch.zeros(2**20)  # 4 MiB
        tensors[f"{layer}.norm"] = torch.ones(64)
    save_tensors(tensors, tmp_path / "model.safetensors")
    kept = [weight for name, weight in WeightReader(tmp_path) if name.endswith(".norm")]
    assert len(kept) == 6 and all(bool((weight == 1).all()) for weight in kept)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(tmp_path) not in maps


def test_the_layer_probe_equals_the_model(runs: dict[str, Path]) -> None:
    base = Path(read_manifest(runs["float32"]).language_model)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    probe = LayerProbe(model.config)
    state = model.state_dict()
    for group in group_by_layer(WeightReader(base).files):
        probe.advance({name: state[name] for name in group})
    with torch.no_grad():
        torch.testing.assert_close(probe.logits, model(probe._input_ids).logits[0], atol=1e-5, rtol=1e-5)
    unmerged, merged = LayerProbe(model.config), LayerProbe(model.config)
    update = LoraUpdate(runs["float32"] / "adapter")
    for group in group_by_layer(WeightReader(base).files):
        unmerged.advance({name: state[name] for name in group}, update)
        merged.advance({name: update.apply(name.removesuffix(".weight"), state[name]) for name in group})
    torch.testing.assert_close(unmerged.logits, merged.logits, atol=1e-4, rtol=1e-4)
    assert (unmerged.logits - probe.logits).abs().max() > 0.01  # type: ignore[operator]


@pytest.mark.parametrize("name", ["float32", "nf4"])
def test_a_model_in_many_shards_is_exported_and_imported(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Export to the original's layout and import again, with one or two weights per shard."""
    monkeypatch.setattr(weights, "SHARD_BYTES", TINY_SHARD)
    export_run(runs[name], tmp_path / "llava", format="llava", dtype="float32")
    assert len(list((tmp_path / "llava").glob("model-*.safetensors"))) > 20
    import_llava(tmp_path / "llava", tmp_path / "back", template=read_manifest(runs[name]).template)
    assert len(list((tmp_path / "back" / "language_model").glob("model-*.safetensors"))) > 20
    before, after = (
        probe_logits(load_run(path, dtype=torch.float32).model) for path in (runs[name], tmp_path / "back")
    )
    assert (after - before).abs().max() < (0.02 if name == "nf4" else 1e-4) * before.abs().max()


def test_the_reader_names_damaged_files(runs: dict[str, Path], tmp_path: Path) -> None:
    base = Path(read_manifest(runs["float32"]).language_model)
    shutil.copytree(base, tmp_path / "cut")
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{shard.name} .*cannot be read.*get it again"):
        WeightReader(tmp_path / "cut")
    shutil.copytree(base, tmp_path / "swapped")
    shard = sorted((tmp_path / "swapped").glob("*.safetensors"))[2]
    tensors = load_file(shard)
    tensors.pop(min(tensors))
    save_file(tensors or {"other": torch.zeros(1)}, shard)
    with pytest.raises(UserError, match=r"index\.json says that .* holds .*, but it does not"):
        WeightReader(tmp_path / "swapped")
