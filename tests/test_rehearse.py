"""The rehearsal: published layouts, detection of faults, and the golden size from end to end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

from babydoctor.bench.rehearse import program
from babydoctor.bench.rehearse.answers import AnswerTensors, differences
from babydoctor.bench.rehearse.checkpoints import language_model_bytes, write_checkpoints
from babydoctor.bench.rehearse.commands import StepError, run_process
from babydoctor.bench.rehearse.context import STAGES, Context, Row
from babydoctor.bench.rehearse.program import RehearsalStep, rehearse, run_steps
from babydoctor.bench.rehearse.report import write_guide
from babydoctor.bench.rehearse.sizes import SIZES, find_size
from babydoctor.bench.rehearse.training import same_run, stage_overrides
from babydoctor.schema import UserError

PYTHON = [sys.executable, "-c"]


def build_context(folder: Path) -> Context:
    return Context(find_size("golden"), folder, Console(file=(folder / "console.txt").open("w"), width=200))


@pytest.mark.slow
def test_every_command_runs_at_the_golden_size(tmp_path: Path) -> None:
    """Every command, from random checkpoints to answers over HTTP; the table says what is wrong."""
    command = ["bench", "rehearse", "--size", "golden", "--keep", str(tmp_path)]
    done = subprocess.run([*PYTHON, "from babydoctor.cli.main import main; main()", *command], stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout.decode()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    labels = [row["label"] for row in rows]
    for stage in STAGES:
        assert f"{stage}: resumed = uninterrupted" in labels
    for road in ("eval = chat", "LLaVA protocol = chat", "OpenAI API = chat", "merged = run", "hf export = run"):
        assert road in labels
    assert all(row["peak_bytes"] > 2**20 for row in rows if row["seconds"] is not None)


def test_checkpoints_have_the_published_layout(tmp_path: Path) -> None:
    from transformers import AutoConfig, CLIPModel, LlamaForCausalLM

    from babydoctor.data.tokens import load_tokenizer

    write_checkpoints(find_size("golden"), tmp_path)
    llama, clip = tmp_path / "llama", tmp_path / "clip"
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    frequencies = {name for name in index["weight_map"] if name.endswith("rotary_emb.inv_freq")}
    assert len(frequencies) == find_size("golden").language["num_hidden_layers"]
    expected = LlamaForCausalLM(AutoConfig.from_pretrained(llama)).state_dict()
    assert index["weight_map"].keys() - frequencies == expected.keys()
    with safe_open(clip / "model.safetensors", "pt") as file:
        names = set(file.keys())
    position_ids = {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
    assert names - position_ids == CLIPModel(AutoConfig.from_pretrained(clip)).state_dict().keys()
    assert position_ids <= names
    tokenizer = load_tokenizer(llama)
    text = "The chest scan shows a NODULE,\n 12 mm: ü"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == find_size("golden").language["vocab_size"]


def test_the_7b_has_the_published_size() -> None:
    """6,738,415,616 parameters, of which 266,240 are norms; 9.98 GB and 3.50 GB in two shards."""
    seven = SIZES["7b"]
    num_bytes = language_model_bytes(seven.language)
    assert num_bytes == 2 * (6_738_415_616 - 266_240)
    assert seven.shard_bytes < num_bytes < 2 * seven.shard_bytes
    assert SIZES["wide"].language == {**seven.language, "num_hidden_layers": 2}


def test_only_paths_and_counts_are_overridden(tmp_path: Path) -> None:
    context = build_context(tmp_path)
    for stage in STAGES:
        keys = {override.split("=")[0] for override in stage_overrides(context, stage, tmp_path / "out")}
        assert keys <= {
            *("output_dir", "init_from", "model.language_model", "model.vision_tower"),
            *("data.rows", "data.images", "data.eval_rows", "data.eval_limit", "data.num_workers"),
            *("train.batch_size", "train.micro_batch_tokens", "train.max_steps", "train.save_every"),
            "train.num_sample_answers",
        }


def build_answer(**changes: np.ndarray) -> AnswerTensors:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    return replace(AnswerTensors(logits.argmax(-1), logits, np.arange(9)), **changes)


def test_differences_of_answers_are_found() -> None:
    reference = build_answer()
    assert differences(reference, build_answer(), 0.02)[1] == []
    wider = np.pad(reference.logits, ((0, 0), (0, 1)))
    assert differences(reference, build_answer(logits=wider), 0.02)[1] == []
    noisy = build_answer(logits=reference.logits + 0.1 * reference.logits.max())
    assert "logits differ" in differences(reference, noisy, 0.02)[1][0]
    assert "other tokens" in differences(reference, build_answer(prompt=np.arange(8)), 0.02)[1][0]
    tokens = reference.tokens.copy()
    tokens[1] = reference.logits[1].argmin()
    note, faults = differences(reference, build_answer(tokens=tokens), 0.02)
    assert note.startswith("1 of 3") and "token 2" in faults[0]
    # Rounding may favor the second-best token if it is equally likely.
    close = reference.logits.copy()
    close[1, tokens[1]] = close[1].max() - 1e-4
    assert differences(build_answer(logits=close), build_answer(logits=close, tokens=tokens), 0.02)[1] == []


def write_run(folder: Path, losses: list[float], projector: bytes) -> Path:
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    records = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "projector.safetensors").write_bytes(projector)
    for name in ("trainable", "optimizer"):
        (folder / "checkpoints" / "step-2" / f"{name}.safetensors").write_bytes(b"state")
    return folder


def test_runs_are_compared_bit_by_bit(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", [2.0, 1.5], b"abcd")
    assert same_run(whole, write_run(tmp_path / "same", [2.0, 1.5], b"abcd"), 2)[1] == []
    faults = same_run(whole, write_run(tmp_path / "other", [2.0, 1.5000001], b"abce"), 2)[1]
    assert "losses" in faults[0] and faults[1] == "projector.safetensors differs"
    (tmp_path / "same" / "checkpoints" / "step-2" / "optimizer.safetensors").unlink()
    assert same_run(whole, tmp_path / "same", 2)[1] == ["checkpoints/step-2/optimizer.safetensors is missing"]


def test_time_and_peak_memory_of_a_process_are_measured(tmp_path: Path) -> None:
    code = "import time; data = bytearray(300 * 2**20); time.sleep(0.3); print('done')"
    finished = run_process([*PYTHON, code], tmp_path / "log", console=Console(quiet=True), limit_s=60)
    assert (finished.status, finished.stdout.strip()) == (0, "done")
    assert finished.seconds > 0.3
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 300 * 2**20 < finished.peak_bytes < max(own, 300 * 2**20) + 50 * 2**20


def test_a_process_is_killed_on_a_condition_and_at_its_limit(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(600)"
    quiet = Console(quiet=True)
    finished = run_process([*PYTHON, code], tmp_path / "log", console=quiet, limit_s=60, kill_when=mark.exists)
    assert finished.status == -9
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    begun = time.monotonic()
    with pytest.raises(StepError, match="still running"):
        run_process([*PYTHON, code], tmp_path / "slow", console=quiet, limit_s=3)
    assert time.monotonic() - begun < 60
    pid = int((tmp_path / "slow.out").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_failed_command_is_reported_and_the_others_continue(tmp_path: Path) -> None:
    context = build_context(tmp_path)
    ran = []

    def fail(context: Context) -> None:
        context.execute("break", [*PYTHON, "print('so far'); raise ValueError('the reason')"])

    steps = [
        RehearsalStep("one", fail),
        RehearsalStep("two", lambda context: ran.append("two"), needs=("one",)),
        RehearsalStep("three", lambda context: ran.append("three")),
    ]
    run_steps(context, steps)
    assert ran == ["three"]
    assert [(row.label, row.ok) for row in context.rows] == [("break", False), ("two", False)]
    assert context.rows[0].note == "exit status 1: ValueError: the reason"
    context.console.file.flush()
    output = (tmp_path / "console.txt").read_text()
    assert "so far" in output and "skipped: one failed" in output
    again = build_context(tmp_path)
    again.load()
    assert again.rows == context.rows


def test_steps_depend_on_earlier_steps() -> None:
    for number, step in enumerate(program.STEPS):
        assert set(step.needs) <= {earlier.name for earlier in program.STEPS[:number]}


def test_bad_options_are_refused(tmp_path: Path) -> None:
    console = Console(quiet=True)
    with pytest.raises(UserError, match=r"--size 'huge'.*golden"):
        rehearse("huge", console=console)
    with pytest.raises(UserError, match=r"--only 'marge'.*merge"):
        rehearse("golden", only=["marge"], keep=tmp_path, console=console)
    with pytest.raises(UserError, match="--keep"):
        rehearse("golden", only=["merge"], console=console)
    with pytest.raises(UserError, match="holds no rehearsal"):
        rehearse("golden", only=["merge"], keep=tmp_path, console=console)
    Context(find_size("golden"), tmp_path, console).save()
    with pytest.raises(UserError, match="of --size golden, not wide"):
        rehearse("wide", only=["merge"], keep=tmp_path, console=console)


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    guide = tmp_path / "README.md"
    rows = [Row("merge", "merge", 12.34, 2**30, None), Row("merge", "merged = run", note="a | b", ok=False)]
    with pytest.raises(UserError, match="rehearse wide: begin"):
        write_guide("wide", rows, guide)
    guide.write_text("before\n<!-- rehearse wide: begin -->\nold\n<!-- rehearse wide: end -->\nafter\n")
    write_guide("wide", rows, guide)
    text = guide.read_text()
    assert "| merge | 12.3 s | 1.00 |  |  |" in text
    assert "FAILED: a \\| b" in text
    assert "old" not in text and text.startswith("before\n") and text.endswith("-->\nafter\n")
