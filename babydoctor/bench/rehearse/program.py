"""The rehearsal: each step runs real commands. A failed step is reported, and steps that do not need it still run."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from babydoctor.bench.rehearse import products, serving, training
from babydoctor.bench.rehearse.commands import StepError
from babydoctor.bench.rehearse.context import STAGES, Context, Row, remove
from babydoctor.bench.rehearse.report import print_table, write_guide
from babydoctor.bench.rehearse.sizes import find_size
from babydoctor.schema import UserError


@dataclass(frozen=True)
class RehearsalStep:
    """A part of the rehearsal. It is skipped if a step in ``needs`` has failed in the same rehearsal."""

    name: str
    run: Callable[[Context], None]
    needs: tuple[str, ...] = ()


STEPS = (
    RehearsalStep("checkpoints", training.write_checkpoints),
    RehearsalStep("data", training.prepare_data),
    *(
        RehearsalStep(stage, partial(training.train_stage, stage=stage), ("checkpoints", "data", *STAGES[:number]))
        for number, stage in enumerate(STAGES)
    ),
    RehearsalStep("plan", training.plan_last, ("instruct",)),
    # These steps use the last stage that has finished.
    RehearsalStep("strong", training.strengthen_last, ("align",)),
    RehearsalStep("chat", serving.chat, ("strong",)),
    RehearsalStep("eval", serving.evaluate, ("strong",)),
    RehearsalStep("serve", serving.serve, ("strong",)),
    RehearsalStep("reference", products.ask_reference, ("strong",)),
    RehearsalStep("merge", products.merge, ("reference",)),
    RehearsalStep("export", products.export_hf_and_gguf, ("reference",)),
    RehearsalStep("import", products.export_llava, ("reference",)),
)
STEP_NAMES = tuple(step.name for step in STEPS)


def rehearse(
    size_name: str, *, only: Sequence[str] = (), keep: Path | None = None, guide: bool = False, console: Console
) -> bool:
    """Run the rehearsal, or some of its steps, and print the table.

    Args:
        only: names of steps; empty: all. Their inputs must be in ``keep``.
        keep: folder for all files, which are kept; None: a temporary folder.
        guide: write the table into the bench guide.

    Returns:
        True if every command and every comparison succeeded.

    Raises:
        UserError: an unknown size or step, or ``keep`` holds another size.
    """
    size = find_size(size_name)
    unknown = [name for name in only if name not in STEP_NAMES]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is not a step; there are {', '.join(STEP_NAMES)}")
    if only and keep is None:
        raise UserError("--only needs --keep DIR, the folder of an earlier rehearsal")
    steps = [step for step in STEPS if not only or step.name in only]
    work = (keep or Path(tempfile.mkdtemp(prefix="babydoctor-rehearse-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        context = Context(size, work, console)
        if only:
            context.load()
            context.rows = [row for row in context.rows if row.step not in only]
        else:
            remove(work / "runs")  # no step may use a stage of an earlier rehearsal
        begun = time.monotonic()
        run_steps(context, steps)
        print_table(console, context.rows)
        failed = [row for row in context.rows if not row.ok]
        if guide:
            write_guide(size.name, context.rows)
        console.print(
            f"size {size.name}: {time.monotonic() - begun:.0f} s, {len(failed)} of {len(context.rows)} failed"
        )
        return not failed
    finally:
        if keep is None:
            shutil.rmtree(work, ignore_errors=True)


def run_steps(context: Context, steps: Sequence[RehearsalStep]) -> None:
    """Run the steps in order and save the results after each."""
    failed: set[str] = set()
    begun = time.monotonic()
    for number, step in enumerate(steps, 1):
        context.step = step.name
        missing = [name for name in step.needs if name in failed]
        place = f"[{number}/{len(steps)}] {step.name} ({time.monotonic() - begun:.0f} s so far)"
        context.console.print(place, style="bold", markup=False)
        if missing:
            failed.add(step.name)
            context.rows.append(Row(step.name, step.name, note=f"skipped: {missing[0]} failed", ok=False))
            context.console.print(f"    skipped: {missing[0]} failed", style="red")
            continue
        try:
            step.run(context)
        except (StepError, UserError, OSError, ValueError, KeyError) as error:
            failed.add(step.name)
            context.console.print(f"    FAILED: {error}", style="red", markup=False, soft_wrap=True)
            if all(row.ok for row in context.rows if row.step == step.name):
                context.rows.append(Row(step.name, step.name, note=f"{type(error).__name__}: {error}", ok=False))
        context.save()
