"""The shipped configurations at LLaMA-2-7B's and CLIP-L's hidden sizes with few layers: kill -9, resume, bit-equal."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.base_models import write_base_models
from helpers.training import start_training, wait_until

from babydoctor.bench.measure import peak_rss_bytes
from babydoctor.config import dump_config, load_config
from babydoctor.conversation import TEMPLATES
from babydoctor.model.known_sizes import CLIP_L, LLAMA_2_7B
from babydoctor.model.run_dir import read_manifest

CONFIGS = Path(__file__).parents[1] / "configs"
MAX_STEPS = 3
DEADLINE_S = 600.0
PEAK_BYTES = 5 * 2**30

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama/`` (hidden size 4096, one layer) and ``clip/`` (1024, three layers, 4 patches), random, in bfloat16."""
    return write_base_models(
        tmp_path_factory.mktemp("wide_base"),
        llama=LLAMA_2_7B | {"num_hidden_layers": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        clip=CLIP_L | {"num_hidden_layers": 3},
        text=TEMPLATES["llava_llama_2"].system,
        vocab_size=600,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the three stages. Each stage starts from the previous one."""
    return tmp_path_factory.mktemp("wide_runs")


def write_stage_config(runs: Path, stage: str, base: Path, rows: Path) -> Path:
    """The shipped configuration with its optimizer, precision and LoRA, but other paths and counts."""
    before = {"instruct": "align", "radiology": "instruct"}.get(stage)
    overrides = [
        f"output_dir={runs / stage}",
        f"data.rows={rows / 'rows.json'}",
        f"data.images={rows / 'images'}",
        *("data.eval_rows=[]", "data.num_workers=0", "train.eval_every=0", "train.num_sample_answers=0"),
        *("train.batch_size=2", f"train.max_steps={MAX_STEPS}", "train.save_every=1"),
        f"train.keep_checkpoints={MAX_STEPS}",
        "tracking.tensorboard=false",
    ]
    if before is None:
        overrides += [f"model.language_model={base / 'llama'}", f"model.vision_tower={base / 'clip'}"]
    else:
        overrides.append(f"init_from={runs / before}")
    path = runs / f"{stage}.yaml"
    path.write_text(dump_config(load_config(CONFIGS / f"{stage}.yaml", overrides)))
    return path


def read_files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.mark.parametrize("stage", ["align", "instruct", "radiology"])
def test_kill_9_and_resume_are_bit_equal(
    wide_base: Path, tiny_rows: Path, runs: Path, stage: str, tmp_path: Path
) -> None:
    """Killed in the third step and resumed from the first checkpoint, a run writes the same second checkpoint."""
    if stage != "align":
        pytest.importorskip("bitsandbytes")
        if not (runs / {"instruct": "align", "radiology": "instruct"}[stage] / "manifest.json").is_file():
            pytest.skip("the stage before did not finish")
    config = write_stage_config(runs, stage, wide_base, tiny_rows)
    checkpoints = runs / stage / "checkpoints"
    process = start_training(config, threads=2)
    wait_until((checkpoints / "step-2").exists, process, DEADLINE_S)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed = read_files(checkpoints / "step-2")
    for path in checkpoints.iterdir():
        if path.name != "step-1":
            shutil.rmtree(path)

    resumed = start_training(config, "--resume", threads=2)
    peak_bytes = 0

    def is_finished() -> bool:
        nonlocal peak_bytes
        peak_bytes = max(peak_bytes, peak_rss_bytes(resumed.pid))
        return (runs / stage / "manifest.json").exists()

    wait_until(is_finished, resumed, DEADLINE_S)
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err[-3000:]
    assert "resumed after step 1" in out
    again = read_files(checkpoints / "step-2")
    assert again.keys() == killed.keys()
    assert [name for name in killed if again[name] != killed[name]] == []
    assert read_manifest(runs / stage).lineage[-1].steps == MAX_STEPS
    if stage != "align":
        check_8bit_state(checkpoints / f"step-{MAX_STEPS}")
    assert 0 < peak_bytes < PEAK_BYTES


def check_8bit_state(checkpoint: Path) -> None:
    """The optimizer's state is 8-bit, and its two quantization maps are stored once."""
    content = (checkpoint / "optimizer.safetensors").read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert sum(name.endswith("qmap1") or name.endswith("qmap2") for name in header) == 2
    assert sum(value.get("dtype") == "U8" for value in header.values()) >= 2 * 14
