"""Importing and exporting large checkpoints needs memory for the largest shard and little more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MB = 2**20
SLACK_BYTES = 64 * MB
"""Two copies of the largest weight (17 MB) in float32, buffers of files, and what libraries load on first use."""

PROGRAM = """
import sys, pathlib
import torch, transformers, babydoctor.interop.export, babydoctor.interop.llava_import, babydoctor.interop.gguf_export
from transformers import LlamaForCausalLM, CLIPVisionConfig
babydoctor.model.weights.SHARD_BYTES = 80 * 2**20
def status(key):
    return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1]) * 1024
step, source, out = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
pathlib.Path('/proc/self/clear_refs').write_text('5')  # the high-water mark begins here
before = status('VmRSS')
if step == 'import':
    babydoctor.interop.llava_import.import_llava(source, out)
else:
    babydoctor.interop.export.export_run(source, out, format=step, dtype='q8_0' if step == 'gguf' else None)
print('PEAK', status('VmHWM') - before)
"""


@pytest.fixture(scope="module")
def wide(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A merged LLaVA of random weights, 420 MB in four .bin shards, and the size of the largest."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(golden / "clip", folder / "clip")
    source = folder / "llava-wide"
    shutil.copytree(golden / "llava-golden-merged-bin", source, ignore=shutil.ignore_patterns("*.bin*"))
    config = json.loads((source / "config.json").read_text())
    width, inner, num_layers = 1024, 4096, 6
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": num_layers}
    (source / "config.json").write_text(
        json.dumps({**config, **sizes, "num_attention_heads": 16, "num_key_value_heads": 16})
    )
    shapes = {
        "model.embed_tokens.weight": (1500, width),
        "lm_head.weight": (1500, width),
        "model.norm.weight": (width,),
        "model.mm_projector.weight": (width, 32),
        "model.mm_projector.bias": (width,),
    }
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    names = sorted(shapes)
    weight_map = {}
    for index in range(4):
        members = names[index::4]
        file = f"pytorch_model-{index + 1:05d}-of-00004.bin"
        torch.save({name: torch.rand(shapes[name]).sub_(0.5).mul_(0.02) for name in members}, source / file)
        weight_map |= dict.fromkeys(members, file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source, max(file.stat().st_size for file in source.glob("*.bin"))


def peak(step: str, source: Path, out: Path) -> int:
    result = subprocess.run([sys.executable, "-c", PROGRAM, step, source, out], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split("PEAK")[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured by Linux's /proc")
def test_peak_memory_is_one_shard(wide: tuple[Path, int], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed (pip install 'babydoctor[interop]')")
    source, shard_bytes = wide
    total_bytes = sum(file.stat().st_size for file in source.glob("*.bin"))
    assert total_bytes > shard_bytes + SLACK_BYTES + 200 * MB  # a copy of the whole model would exceed this
    peaks = {"import": peak("import", source, tmp_path / "run")}
    for step in ("hf", "llava", "gguf"):
        peaks[step] = peak(step, tmp_path / "run", tmp_path / step)
        shutil.rmtree(tmp_path / step)
    assert len(list((tmp_path / "run" / "language_model").glob("*.safetensors"))) > 3
    print({step: f"{value / MB:.0f} MB" for step, value in peaks.items()}, f"shard {shard_bytes / MB:.0f} MB")
    assert max(peaks.values()) < shard_bytes + SLACK_BYTES, peaks
