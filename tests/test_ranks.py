"""Several ranks in real processes: DDP, FSDP2, ZeRO-2 and ZeRO-3 give the result of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, is_deepspeed_available
from helpers.launch import ENVIRONMENT, ROOT, kill_rank, launch
from helpers.serving import free_port
from helpers.training import DEADLINE_S, losses, unfinish, wait_until
from safetensors.torch import load_file

from babydoctor.config import TrainConfig, build_config, dump_config, load_config
from babydoctor.data.convert import convert_rows
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import find_damage, list_checkpoints
from babydoctor.train.loop import train
from babydoctor.train.strategy import deepspeed_problems, fsdp_problems, start_accelerator
from babydoctor.train.tracking import read_metrics

NEEDS_DEEPSPEED = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
STRATEGIES = (
    pytest.param("multi_gpu", "ddp", id="ddp"),
    pytest.param("fsdp", "fsdp", id="fsdp"),
    pytest.param("deepspeed_zero2", "zero2", id="zero2", marks=NEEDS_DEEPSPEED),
    pytest.param("deepspeed_zero3", "zero3", id="zero3", marks=NEEDS_DEEPSPEED),
)


def run_program(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S * 2)


@pytest.fixture(scope="module")
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    """Four steps with unevenly distributed micro-batches, some without an image, with a LoRA and held-out rows."""
    trained = {"max_steps": 4, "batch_size": 5, "micro_batch_tokens": 256, "eval_every": 2}
    eval_rows = {"eval_rows": tiny_settings["data"]["rows"], "eval_limit": 3}
    return tiny_settings | {
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "train": tiny_settings["train"] | trained,
        "data": tiny_settings["data"] | eval_rows,
    }


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return train(build_config(settings | {"output_dir": str(tmp_path_factory.mktemp("ranks") / "alone")}))


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(build_config(settings | {"output_dir": "unset"})))
    return file


def assert_equal_runs(run: Path, other: Path) -> None:
    """Equal losses, held-out losses and final weights to 1e-5."""
    assert [loss for _, loss in losses(run)] == pytest.approx([loss for _, loss in losses(other)], abs=1e-5)
    for name in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(run / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5


@pytest.mark.parametrize(("accelerate_config", "strategy"), STRATEGIES)
def test_two_ranks_train_and_resume_as_one(
    config: Path, alone: Path, tmp_path: Path, accelerate_config: str, strategy: str
) -> None:
    run = tmp_path / "run"
    overrides = []
    if strategy == "ddp":  # the ranks read the converted rows; one process continues with the JSON rows
        data = load_config(config, []).data
        convert_rows(data.rows, tmp_path / "converted", images=Path(str(data.images)))
        overrides = [f"{rank}:data.rows={tmp_path / 'converted'}" for rank in range(2)]
    done = run_program(launch(accelerate_config, "helpers.rank_program", str(config), str(run), *overrides))
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"run-rank-{rank}.json").read_text()) for rank in range(2)]
    assert [report["world_size"] for report in reports] == [2, 2]
    history = json.loads((run / "history.json").read_text())
    assert (history["ranks"], history["strategy"]) == (2, strategy)

    whole = tmp_path / "run-whole"
    assert len(read_metrics(whole)) == 6  # four steps, two evaluations
    assert_equal_runs(whole, alone)
    # Continued on the same ranks: bit-equal.
    assert losses(run) == losses(whole)
    assert (run / "projector.safetensors").read_bytes() == (whole / "projector.safetensors").read_bytes()

    shares = [report["share_bytes"] / report["weight_bytes"] for report in reports]
    assert max(shares) < 0.52 if strategy in ("fsdp", "zero3") else shares == [1, 1]

    # Continued by one process.
    unfinish(run, last_step=2)
    train(load_config(config, [f"output_dir={run}"]), resume=True)
    assert_equal_runs(run, alone)
    resume = json.loads((run / "history.json").read_text())["resumes"][-1]
    assert resume["step"] == 2 and resume["changed"]["ranks"] == {"from": 2, "to": 1}
    assert resume["changed"]["strategy"] == {"from": strategy, "to": "one"}


def test_two_machines_without_a_shared_disk(config: Path, alone: Path, tmp_path: Path) -> None:
    """Two launchers with separate output directories; on resume only the first machine has the checkpoint."""
    program = ["helpers.rank_program", str(config)]
    common = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}"]
    processes = []
    for machine in range(2):
        (tmp_path / f"machine{machine}").mkdir()
        command = launch("multi_node", *program, str(tmp_path / f"machine{machine}" / "run"))
        where = command.index("-m", 3)
        command[where:where] = [*common, f"--machine_rank={machine}"]
        command.remove("--main_process_port=0")
        processes.append(subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=DEADLINE_S * 2)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    for rank in range(2):
        report = json.loads((tmp_path / f"machine{rank}" / f"run-rank-{rank}.json").read_text())
        assert report["world_size"] == 2
    assert_equal_runs(tmp_path / "machine0" / "run", alone)
    assert not (tmp_path / "machine1" / "run" / "checkpoints").exists()


def test_ranks_with_different_settings_stop_with_one_message(config: Path, tmp_path: Path) -> None:
    override = "1:train.learning_rate=0.5"
    done = run_program(launch("multi_gpu", "helpers.rank_program", str(config), str(tmp_path / "run"), override))
    assert done.returncode != 0
    assert done.stderr.count("rank 1 on") == 1
    assert "has another train.learning_rate than rank 0" in done.stderr and "(0.5, not 0.001)" in done.stderr
    assert not (tmp_path / "run").exists()


def test_kill_9_of_a_rank_ends_all_and_leaves_complete_checkpoints(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = ["babydoctor.train", str(config), f"output_dir={run}", "train.max_steps=100000", "train.save_every=1"]
    command = launch("multi_gpu", *program, "train.eval_every=0")
    process = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until((run / "checkpoints" / "step-3").exists, process)
    kill_rank(process, 1)
    assert not (run / "manifest.json").exists()
    assert [find_damage(checkpoint) for checkpoint in list_checkpoints(run)] == [None, None]


@pytest.mark.slow
def test_two_ranks_stop_after_the_same_step_and_resume(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = ["babydoctor.train", str(config), f"output_dir={run}", "train.max_steps=100000", "train.save_every=0"]
    for arguments in ([], ["--resume"]):
        before = len(read_metrics(run))
        process = subprocess.Popen(
            launch("multi_gpu", *program, "train.eval_every=0", *arguments),
            env=ENVIRONMENT,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_until(lambda before=before: len(read_metrics(run)) > before, process)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode != 0
        step = read_metrics(run)[-1]["step"]
        # The launcher signals the ranks one by one, so the second may have stopped before its signal arrives.
        assert f"stopped by SIGTERM after step {step} of 100000; a checkpoint is saved" in err, err[-3000:]
        assert list_checkpoints(run)[-1].name == f"step-{step}"
        assert ("resumed after step" in out) == bool(arguments)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its first configuration for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "asks for FSDP, and this process was started alone"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "gradient_accumulation_steps is set"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_config is set"),
    ],
)
def test_unsupported_accelerate_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None, environment: dict[str, str], message: str
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        start_accelerator(TrainConfig())


def test_unsupported_fsdp_settings_are_refused() -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_offload=True, activation_checkpointing=True, transformer_cls_names_to_wrap=["CLIPEncoder"]
    )
    found = list(fsdp_problems(plugin))
    assert [problem.split(":")[0].split(" ")[0] for problem in found] == [
        "fsdp_offload_params",
        "fsdp_activation_checkpointing",
        "fsdp_transformer_layer_cls_to_wrap",
    ]
    assert list(fsdp_problems(FullyShardedDataParallelPlugin(fsdp_version=1))) == ["fsdp_version: 1; set 2"]


@NEEDS_DEEPSPEED
def test_unsupported_deepspeed_settings_are_refused() -> None:
    settings = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
        "gradient_clipping": 0.3,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
    }
    found = " ".join(deepspeed_problems(DeepSpeedPlugin(hf_ds_config=settings), TrainConfig()))
    keys = ("stage: 1", "bf16.enabled", "optimizer is set", "offload_optimizer", "steps must be 1", "gradient_clipping")
    assert all(key in found for key in keys), found
