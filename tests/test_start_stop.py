"""Starting and stopping: failed starts, locks, signals, full disks, and what a resumed run may change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.training import DEADLINE_S, build_settings, losses, small_disk, start_training, unfinish, wait_until

from babydoctor.config import build_config, dump_config, load_config
from babydoctor.model.run_dir import read_manifest
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import list_checkpoints
from babydoctor.train.loop import train
from babydoctor.train.tracking import read_metrics


def start(settings: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    file = Path(settings["output_dir"] + ".yaml")
    file.write_text(dump_config(build_config(settings)))
    return start_training(file, *arguments)


def with_train(settings: dict[str, Any], **values: Any) -> dict[str, Any]:
    return settings | {"train": settings["train"] | values}


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Failed starts


def test_a_failed_start_leaves_nothing_behind(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """A failed start removes the directory and its parents. The fixed configuration starts without --resume."""
    settings = build_settings(tiny_settings, tmp_path / "runs" / "first", "instruct")
    good = settings["data"]
    for wrong in ({"images": str(tmp_path / "nowhere")}, {"rows": [str(tmp_path / "missing.json")]}):
        with pytest.raises(UserError, match=r"nowhere|missing\.json"):
            train(build_config(settings | {"data": good | wrong}))
        assert content(tmp_path) == []
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(UserError, match="nowhere"):
        train(build_config(settings | {"data": good | {"images": str(tmp_path / "nowhere")}}))
    assert content(tmp_path) == ["runs", "runs/first"], "an empty directory that was there stays"
    train(build_config(settings))


def test_a_failure_in_the_first_step_leaves_nothing_behind(
    tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(tiny_rows / "images", images)
    for path in images.iterdir():
        path.write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    settings = build_settings(tiny_settings, tmp_path / "run", "align")
    with pytest.raises(UserError, match="png"):
        train(build_config(settings | {"data": settings["data"] | {"images": str(images)}}))
    assert not (tmp_path / "run").exists()


def test_a_failed_resume_does_not_change_the_run(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = build_settings(tiny_settings, run, "align")
    train(build_config(settings))
    unfinish(run, last_step=4)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="nowhere"):
        train(build_config(settings | {"data": settings["data"] | {"images": str(tmp_path / "nowhere")}}), resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_directory_with_other_files_is_refused_and_unchanged(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no run.*thesis\.tex"):
        train(build_config(build_settings(tiny_settings, tmp_path / "run", "align")))
    assert content(tmp_path / "run") == ["thesis.tex"]


def test_a_start_killed_while_loading_can_be_repeated(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "base_adapters" / "0-align").mkdir(parents=True)
    (run / ".config.yaml.tmp-1").write_text("half")
    (run / ".lock").write_text("process 1 on elsewhere\n")
    train(build_config(build_settings(tiny_settings, run, "align")))
    assert not (run / "base_adapters").exists()
    assert [name for name in content(run) if name.startswith(".")] == []


# One process per output directory


def test_a_second_process_is_refused_with_the_pid_of_the_first(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = with_train(build_settings(tiny_settings, tmp_path / "run", "align"), max_steps=100_000, save_every=1)
    settings["data"] = settings["data"] | {"num_workers": 1}
    process = start(settings)
    try:
        wait_until(lambda: bool(list_checkpoints(tmp_path / "run")), process)
        with pytest.raises(UserError, match=rf"run is in use by process {process.pid} on \S+; wait until"):
            train(build_config(settings), resume=True)
    finally:
        process.kill()
        process.communicate()
    # The lock is released with its owner, although the owner's data loader process may live for some seconds.
    with pytest.raises(UserError, match="nowhere"):
        train(build_config(settings | {"data": settings["data"] | {"images": str(tmp_path / "nowhere")}}), resume=True)


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint_at_the_end_of_the_step(
    tiny_settings: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    """All processes of the group are signaled, the data loader's included, like by a terminal and Slurm."""
    run = tmp_path / "run"
    settings = with_train(build_settings(tiny_settings, run, "instruct"), max_steps=100_000, save_every=0)
    settings["data"] = settings["data"] | {"num_workers": 2}
    process = start(settings)
    wait_until(lambda: bool(read_metrics(run)), process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + number, err
    step = read_metrics(run)[-1]["step"]
    assert f"stopped by {number.name} after step {step} of 100000; a checkpoint is saved" in err
    assert err.count(f"{number.name}: a checkpoint is saved at the end of this step") == 1
    assert list_checkpoints(run)[-1].name == f"step-{step}"
    assert not (run / ".lock").exists()


@pytest.fixture
def long_step(tiny_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that starts slowly and whose steps take many seconds: 6,000 rows of text each."""
    rows = [
        {
            "id": str(n),
            "conversations": [{"from": "human", "value": f"Say {n}."}, {"from": "gpt", "value": f"{n} " * 9}],
        }
        for n in range(6000)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = with_train(build_settings(tiny_settings, tmp_path / "run", "align"), batch_size=6000)
    return settings | {"data": settings["data"] | {"rows": [str(tmp_path / "rows.json")], "images": None}}


def test_a_second_ctrl_c_ends_at_once(long_step: dict[str, Any], tmp_path: Path) -> None:
    process = start(long_step)
    assert process.stdout is not None and process.stderr is not None
    while "plan:" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    line = process.stderr.readline()
    while "Press Ctrl-C again to end at once without saving" not in line:
        assert line, "no message after the first Ctrl-C"
        line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert not (tmp_path / "run").exists(), "no step was done"


def test_a_signal_during_loading_ends_at_once_and_leaves_nothing(long_step: dict[str, Any], tmp_path: Path) -> None:
    process = start(long_step)
    wait_until((tmp_path / "run" / ".lock").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143
    assert "stopped by SIGTERM before training began; nothing was written" in err
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_held_out_answers_and_a_resume_repeats_them(
    tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    numbers = {"max_steps": 2, "save_every": 0, "eval_every": 1, "num_sample_answers": 12}
    settings = with_train(build_settings(tiny_settings, run, "align"), **numbers)
    settings["data"] = settings["data"] | {"eval_rows": [str(tiny_rows / "rows.json")]}
    process = start(settings)
    wait_until(lambda: bool(read_metrics(run)), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143 and "after step 1 of 2" in err
    assert [(r["step"], r["kind"]) for r in read_metrics(run)] == [(1, "train")]
    assert [path.name for path in list_checkpoints(run)] == ["step-1"]
    train(build_config(settings), resume=True)
    recorded = [(r["step"], r["kind"]) for r in read_metrics(run)]
    assert recorded == [(1, "train"), (1, "eval"), (2, "train"), (2, "eval")]


# Checkpoints and evaluation, full disks


def test_the_checkpoint_precedes_the_evaluation_which_a_resume_repeats(
    tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path
) -> None:
    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(tiny_rows / "images", images)
    (images / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    settings = with_train(build_settings(tiny_settings, run, "align"), eval_every=2)
    held_out = {"eval_rows": [str(tiny_rows / "rows.json")], "eval_images": str(images)}
    settings["data"] = settings["data"] | held_out
    with pytest.raises(UserError, match=r"3\.png|decoded"):
        train(build_config(settings))
    assert [path.name for path in list_checkpoints(run)] == ["step-2"]
    shutil.copy(tiny_rows / "images" / "3.png", images)
    train(build_config(settings), resume=True)
    assert [record["step"] for record in read_metrics(run) if record["kind"] == "eval"] == [2, 4, 6]
    assert [record["step"] for record in read_metrics(run) if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_disk_was_full_continues_bit_equal(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    wide = {"lora": {"r": 64, "alpha": 8, "dropout": 0.1}}  # a checkpoint of 1.7 MB
    train(build_config(tiny_settings | wide | {"output_dir": str(tmp_path / "whole")}))
    with small_disk(tmp_path / "disk", "3m") as disk:
        config = build_config(tiny_settings | wide | {"output_dir": str(disk / "run")})
        with pytest.raises(UserError, match=r"checkpoint of step 4 .*no space left.*step-2 with --resume"):
            train(config)
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        train(config, resume=True)
        assert losses(disk / "run") == losses(tmp_path / "whole")


# What a resumed run may change


def test_settings_that_do_not_change_training_may_change_and_are_recorded(
    tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path
) -> None:
    """Micro-batches, recomputation, length, and the paths of run, rows and images."""
    no_dropout = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    steps = {"schedule": "constant", "warmup_ratio": 0.0}
    settings = with_train(tiny_settings | no_dropout | {"output_dir": str(tmp_path / "run")}, **steps)
    longer = with_train(settings | {"output_dir": str(tmp_path / "whole")}, max_steps=9)
    train(build_config(longer))
    train(build_config(settings))
    unfinish(tmp_path / "run", last_step=4)

    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tiny_rows, tmp_path / "data")
    changed = with_train(longer, micro_batch_tokens=256, gradient_checkpointing="full")
    data = changed["data"] | {"rows": [str(tmp_path / "data" / "rows.json")], "images": str(tmp_path / "data/images")}
    changed = changed | {"output_dir": str(tmp_path / "moved"), "data": data}
    train(build_config(changed), resume=True)

    assert [step for step, _ in losses(tmp_path / "moved")] == list(range(1, 10))
    for (_, loss), (_, expected) in zip(losses(tmp_path / "moved"), losses(tmp_path / "whole"), strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
    assert load_config(tmp_path / "moved" / "config.yaml") == build_config(changed)
    (resumed,) = read_manifest(tmp_path / "moved").lineage[-1].model_dump()["resumes"]
    assert resumed["step"] == 4
    assert resumed["changed"].keys() == {
        *("output_dir", "data.rows", "data.images"),
        *("train.micro_batch_tokens", "train.gradient_checkpointing", "train.max_steps"),
    }
    assert resumed["changed"]["train.max_steps"] == {"from": 6, "to": 9}


def test_a_finished_run_can_be_made_longer(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = build_settings(tiny_settings, run, "instruct")
    train(build_config(settings))
    six = (run / "projector.safetensors").read_bytes()
    train(build_config(settings), resume=True)
    assert (run / "projector.safetensors").read_bytes() == six
    train(build_config(with_train(settings, max_steps=8)), resume=True)
    assert read_manifest(run).lineage[-1].steps == 8
    assert (run / "projector.safetensors").read_bytes() != six
    with pytest.raises(UserError, match=r"has 8 steps and would have 7 now \(train\.max_steps=7"):
        train(build_config(with_train(settings, max_steps=7)), resume=True)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"learning_rate": 0.5}, "train.learning_rate: 0.001 in the run, 0.5 now"),
        ("train", {"batch_size": 2}, "train.batch_size: 4 in the run, 2 now"),
        ("train", {"optimizer": "paged_adamw_8bit"}, "train.optimizer: 'adamw' in the run, 'paged_adamw_8bit' now"),
        ("train", {"seed": 1}, "train.seed: 42 in the run, 1 now"),
        ("data", {"max_length": 200}, "data.max_length: 256 in the run, 200 now"),
        ("lora", {"r": 8}, "lora.r: 4 in the run, 8 now"),
        ("model", {"dtype": "bfloat16"}, "model.dtype: 'float32' in the run, 'bfloat16' now"),
    ],
)
def test_settings_that_change_training_are_refused(
    stopped_run: dict[str, Any], section: str, change: dict[str, Any], message: str
) -> None:
    changed = stopped_run | {section: stopped_run[section] | change}
    with pytest.raises(UserError, match="change what is learned") as caught:
        train(build_config(changed), resume=True)
    assert message in str(caught.value)
    assert "Use the run's values" in str(caught.value)


def test_another_base_is_refused_and_a_moved_one_is_not(
    stopped_run: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    model = {"language_model": str(tmp_path / "base" / "llama"), "vision_tower": str(tmp_path / "base" / "clip")}
    moved = stopped_run | {"model": stopped_run["model"] | model}
    weights = tmp_path / "base" / "llama" / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:20_000] + bytes(64) + intact[20_064:])
    with pytest.raises(UserError, match=r"model\.language_model leads to another language_model"):
        train(build_config(moved), resume=True)
    weights.write_bytes(intact)
    run = Path(stopped_run["output_dir"])
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    train(build_config(moved | {"output_dir": str(copy)}), resume=True)
    assert read_manifest(copy).language_model == str((tmp_path / "base" / "llama").resolve())


@pytest.fixture(scope="module")
def stopped_run(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that stopped after step 4 of 6."""
    settings = build_settings(tiny_settings, tmp_path_factory.mktemp("stopped") / "run", "instruct")
    train(build_config(settings))
    unfinish(Path(settings["output_dir"]), last_step=4)
    return settings


def test_a_run_without_a_checkpoint_starts_over_with_any_settings(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = build_settings(tiny_settings, tmp_path / "run", "align")
    train(build_config(settings))
    unfinish(tmp_path / "run", last_step=0)
    train(build_config(with_train(settings, learning_rate=0.5)), resume=True)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert load_config(tmp_path / "run" / "config.yaml").train.learning_rate == 0.5
