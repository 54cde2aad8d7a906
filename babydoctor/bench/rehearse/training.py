"""Rehearsal of data, plan and training: the three shipped configurations, chained, killed and resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from babydoctor.bench.rehearse.commands import FinishedProcess, StepError, cli
from babydoctor.bench.rehearse.context import CONFIGS, STAGES, Context, remove
from babydoctor.bench.rehearse.sizes import GIB
from babydoctor.files import split_lines

PLAN_TOLERANCE = 0.10
PROCESS_ALLOWANCE_BYTES = round(0.75 * GIB)
"""How much of the plan's allowance for the process (1 GiB) a short run may leave unused."""

_PLAN_LINE = re.compile(r"plan: ([\d.]+) of [\d.]+ GiB")
_TOTAL_LINE = re.compile(r"^ *total +([\d.]+) GiB", re.M)
SET_OF_STAGE = {"align": "lcs", "instruct": "instruct", "radiology": "roco"}


def write_checkpoints(context: Context) -> None:
    """Write random weights in the published layouts."""
    remove(context.work / "base")
    context.execute_module("write checkpoints", "checkpoints", context.size.name, context.work / "base")


def prepare_data(context: Context) -> None:
    """Prepare the three sets from their published files with ``babydoctor data``, and check each one."""
    work, count = context.work, context.size.num_rows
    phantoms, sources, data = work / "phantoms", work / "sources", work / "data"
    remove(phantoms, sources, data)
    context.execute(
        "data phantom",
        cli("data", "phantom", "--out", phantoms, "--num-train", count, "--num-held-out", 12, "--size", 96),
    )
    context.execute_module("write data sets", "data_sets", phantoms, sources)
    for name in ("lcs", "instruct"):
        context.execute(f"data {name}", cli("data", name, "--source", sources / name, "--out", data / name))
    for split in ("train", "validation"):
        arguments = cli("data", "roco", "--source", sources / "roco", "--split", split, "--out", data / "roco")
        context.execute(f"data roco {split}", arguments)
    for name in SET_OF_STAGE.values():
        rows, images = data / name / "train.json", data / name / "images"
        arguments = cli("data", "check", rows, "--images", images, "--bad", data / f"{name}-bad.jsonl")
        context.execute(f"data check {name}", arguments)


def plan_last(context: Context) -> None:
    """``babydoctor plan`` for the last stage. ``train`` makes the same plan for each stage and prints its total."""
    stage = STAGES[-1]
    arguments = cli("plan", CONFIGS / f"{stage}.yaml", *stage_overrides(context, stage, context.stage_run(stage)))
    context.execute(f"plan {stage}", [*arguments, "--gpu", "cpu"], plan_of=planned_bytes)


def stage_overrides(context: Context, stage: str, output: Path) -> list[str]:
    """Settings for paths and counts. Everything else is from the shipped configuration."""
    size, data = context.size, context.work / "data" / SET_OF_STAGE[stage]
    overrides = [
        f"output_dir={output}",
        f"data.rows={data / 'train.json'}",
        f"data.images={data / 'images'}",
        "data.num_workers=1",
        f"train.batch_size={size.batch_size}",
        f"train.max_steps={size.steps}",
        "train.save_every=1",
    ]
    if stage in size.micro_batch_tokens:
        overrides.append(f"train.micro_batch_tokens={size.micro_batch_tokens[stage]}")
    if stage == "align":
        overrides += [f"model.language_model={context.language_model}", f"model.vision_tower={context.vision_tower}"]
    else:
        overrides += [f"init_from={context.stage_run(STAGES[STAGES.index(stage) - 1])}"]
    if stage == "radiology":
        overrides += [f"data.eval_rows={data / 'validation.json'}", "data.eval_limit=2"]
        overrides += [f"train.num_sample_answers={size.num_sample_answers}"]
    return overrides


def train_stage(context: Context, stage: str) -> None:
    """Train a stage to its end. Train it again, kill it after the first checkpoint, resume it, and compare the two."""
    whole, killed = context.stage_run(stage), context.work / "runs" / f"{stage}-killed"
    remove(whole, killed)
    config = CONFIGS / f"{stage}.yaml"
    finished = context.execute(
        f"train {stage}", cli("train", config, *stage_overrides(context, stage, whole)), plan_of=planned_bytes
    )
    check_output(context, stage, finished)
    check_peak(context)
    check_lineage(context, stage, whole)
    overrides = stage_overrides(context, stage, killed)
    first = killed / "checkpoints" / "step-1"
    context.execute(f"train {stage}, kill -9", cli("train", config, *overrides), kill_when=first.is_dir)
    context.execute(f"train {stage} --resume", cli("train", config, *overrides, "--resume"), plan_of=planned_bytes)
    check_peak(context)
    context.compare(f"{stage}: resumed = uninterrupted", *same_run(whole, killed, context.size.steps))
    remove(killed)
    if context.size.deletes_products:
        remove(whole / "checkpoints")


def planned_bytes(finished: FinishedProcess) -> int | None:
    """The planned peak in a command's output: one line of ``train``, or the table of ``plan``."""
    match = _PLAN_LINE.search(finished.stdout + finished.stderr) or _TOTAL_LINE.search(finished.stdout)
    return None if match is None else round(float(match[1]) * GIB)


def check_output(context: Context, stage: str, finished: FinishedProcess) -> None:
    """Report output that users would mistake for an error."""
    if "LOAD REPORT" in finished.stdout + finished.stderr:
        context.compare(f"{stage}: output", "transformers' LOAD REPORT is shown", ["the layout is the normal one"])


def check_peak(context: Context) -> None:
    """Compare the last command's peak with its plan. A peak above the plan could run out of memory."""
    row = context.rows[-1]
    if not context.size.checks_plan or not row.plan_bytes or not row.peak_bytes:
        return
    off = row.peak_bytes / row.plan_bytes - 1
    note = f"{row.peak_bytes / GIB:.2f} GiB, planned {row.plan_bytes / GIB:.2f} ({off:+.0%})"
    faults = []
    if off > PLAN_TOLERANCE:
        faults.append(f"more than {PLAN_TOLERANCE:.0%} above the plan")
    if row.peak_bytes + PROCESS_ALLOWANCE_BYTES < (1 - PLAN_TOLERANCE) * row.plan_bytes:
        faults.append(f"more than {PLAN_TOLERANCE:.0%} and the process's allowance below the plan")
    context.compare(f"{row.label}: peak = plan", note, faults)


def check_lineage(context: Context, stage: str, run: Path) -> None:
    """Check that the manifest names each stage so far with its steps."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    lineage = [(entry["name"], entry["steps"]) for entry in manifest["lineage"]]
    expected = [(name, context.size.steps) for name in STAGES[: STAGES.index(stage) + 1]]
    note = " -> ".join(name for name, _ in lineage)
    context.compare(f"{stage}: lineage", note, [] if lineage == expected else [f"expected {expected}"])


def same_run(whole: Path, other: Path, steps: int) -> tuple[str, list[str]]:
    """Compare two runs to the bit: losses, projector, adapter, and the last checkpoint with its optimizer state."""
    faults = []
    losses = [_losses(run) for run in (whole, other)]
    if losses[0] != losses[1] or len(losses[0]) != steps:
        faults.append(f"losses {losses[0]} and {losses[1]}")
    last = f"checkpoints/step-{steps}"
    names = ["projector.safetensors", f"{last}/trainable.safetensors", f"{last}/optimizer.safetensors"]
    if (whole / "adapter").is_dir():
        names.append("adapter/adapter_model.safetensors")
    for name in names:
        if not (whole / name).is_file() or not (other / name).is_file():
            faults.append(f"{name} is missing")
        elif not _same_bytes(whole / name, other / name):
            faults.append(f"{name} differs")
    return f"{len(losses[0])} losses and {len(names)} files equal to the bit" if not faults else "differs", faults


def _losses(run: Path) -> list[Any]:
    lines = split_lines((run / "metrics.jsonl").read_text(encoding="utf-8"))
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while block := first.read(2**24):
            if block != second.read(2**24):
                return False
    return True


def strengthen_last(context: Context) -> None:
    """Copy the last finished stage with LoRAs that change its answers. The later steps use the copy."""
    finished = [stage for stage in STAGES if (context.stage_run(stage) / "manifest.json").is_file()]
    if not finished:
        raise StepError("no stage has finished")
    remove(context.run)
    context.execute_module(
        f"give {finished[-1]} random LoRAs", "adapters", context.stage_run(finished[-1]), context.run
    )
    if finished[-1] != STAGES[-1]:
        context.compare("run that is asked", finished[-1], [f"{STAGES[-1]} has not finished"])
