"""Report on a run during training: records for the trackers, the progress bar and the loss curve."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from babydoctor.config import RunConfig
from babydoctor.data.loader import StepData
from babydoctor.eval.reporting.report import headline_figures
from babydoctor.files import write_text
from babydoctor.train.checkpoint import TrainState
from babydoctor.train.optimizer import is_due
from babydoctor.train.tracking import Tracker, read_json_lines, read_metrics

SPEED_WINDOW = 20
"""Speeds are averaged over this many steps."""

LINE_INTERVAL_S = 10.0
"""Shortest time between two progress lines when the output is not a terminal."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss per supervised token, gradient norm before clipping, learning rate.

    Loss and norm are scalars on the device. Reading them waits for the GPU, so it happens every ``train.log_every``
    steps only.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    learning_rate: float


class StepProgress:
    """A progress bar with loss, speed and time left, or plain lines if the output is not a terminal."""

    def __init__(self, name: str, start: int, total: int) -> None:
        self.name, self.total = name, total
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(name, total=total, completed=start, figures="")
        self._start, self._started, self._last_line = start, time.monotonic(), 0.0

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float | None, tokens_per_s: float, samples_per_s: float) -> None:
        """Show the figures after ``step`` steps. ``loss``: the last that was read; None before the first."""
        samples = f"{samples_per_s:.1f}" if samples_per_s >= 1 else f"{samples_per_s:.2g}"
        figures = f"{samples} samples/s  {tokens_per_s:,.0f} tokens/s"
        if loss is not None:
            figures = f"loss {loss:.3f}  {figures}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._last_line > LINE_INTERVAL_S or step == self.total:
            self._last_line = time.monotonic()
            passed = self._last_line - self._started
            left = passed / max(1, step - self._start) * (self.total - step)
            print(f"{self.name}: step {step}/{self.total}  {figures}  {_clock(left)} left", flush=True)

    def say(self, text: str) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plot_loss(run: Path) -> Path | None:
    """Draw ``loss.png``: training loss (thin: each record, thick: smoothed) and held-out loss by step."""
    from matplotlib.figure import Figure

    records = read_metrics(run)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    held_out = [(r["step"], r["loss"]) for r in records if r["kind"] == "eval"]
    if not train:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    smooth, mean = [], losses[0]
    for loss in losses:
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color="tab:blue", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", title=run.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(run / "loss.png", dpi=120)
    return run / "loss.png"


class Reporter:
    """All output about a run. Only the main process's reporter is ``active``; the others do nothing."""

    def __init__(self, run: Path, config: RunConfig, start: int, total: int, *, active: bool) -> None:
        self.run = run
        self.active = active
        self.log_every = config.train.log_every
        self.start, self.total = start, total
        if not active:
            return
        self.tracker = Tracker(run, config, start=start)
        self.progress = StepProgress(config.name, start, total)
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=SPEED_WINDOW)
        self._list = run / "cut_and_left_out.jsonl"
        kept = [line for line in read_json_lines(self._list) if line["step"] <= start]
        write_text(self._list, "".join(json.dumps(line) + "\n" for line in kept))
        self._num_cut = sum("tokens_cut" in line for line in kept)
        self._num_bad = sum("left_out" in line for line in kept)
        self._last = time.monotonic()
        self._last_loss: float | None = None

    def __enter__(self) -> Reporter:
        if self.active:
            self.progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.progress.__exit__(None, None, None)
            self.tracker.close()

    def begin(self, trained: int, num_samples: int, plan: str) -> None:
        """Print the number of samples, steps and trained parameters, and the plan."""
        if not self.active:
            return
        resumed = f", resumed after step {self.start}" if self.start else ""
        self.progress.say(f"{num_samples:,} samples, {self.total:,} steps, {trained:,} trained parameters{resumed}")
        self.progress.say(plan)
        self._last = time.monotonic()

    def step(self, state: TrainState, data: StepData, started: float, result: StepResult) -> None:
        """Record one finished step that began at ``started``. Speeds include the time spent waiting for data."""
        if not self.active:
            return
        now = time.monotonic()
        self._recent.append((now - self._last, data.num_tokens, data.num_samples))
        waited, self._last = started - self._last, now
        seconds, tokens, samples = (sum(column) for column in zip(*self._recent, strict=True))
        speeds = {"tokens_per_s": tokens / seconds, "samples_per_s": samples / seconds}
        self._list_cut_and_bad(state.step, data)
        if is_due(self.log_every, state.step, self.total):
            self._last_loss = result.loss.item()
            record = {"loss": self._last_loss, "gradient_norm": result.gradient_norm.item()}
            record |= {"learning_rate": result.learning_rate, "samples": state.samples, "tokens": data.num_tokens}
            self.tracker.log("train", state.step, **record, **speeds, data_wait_s=max(0.0, waited))
        self.progress.update(state.step, loss=self._last_loss, **speeds)

    def has(self, kind: str, step: int) -> bool:
        """True if the run already had a record of this kind and step when it was resumed."""
        return (kind, step) in self.tracker.recorded

    def held_out(self, state: TrainState, loss: float, answers: Sequence[dict[str, str]]) -> None:
        """Record the held-out loss and print the sample answers."""
        self.tracker.log("eval", state.step, loss=loss, answers=list(answers))
        self.progress.say(f"step {state.step}: held-out loss {loss:.4f}")
        for item in answers:
            question = " ".join(item["question"].split())
            self.progress.say(f"  {question}\n    answer:    {item['answer']}\n    reference: {item['reference']}")
        self._last = time.monotonic()

    def task(self, state: TrainState, name: str, result: Mapping[str, Any]) -> None:
        """Record a task's headline figures under each image condition."""
        for condition, scored in result["conditions"].items():
            figures = {figure: scored["figures"][figure] for figure in headline_figures(result)}
            values = {figure: entry["value"] for figure, entry in figures.items()}
            intervals = {figure: [entry["low"], entry["high"]] for figure, entry in figures.items()}
            self.tracker.log(
                f"task/{condition}",
                state.step,
                task=name,
                num_failed=result["num_failed"][condition],
                **values,
                intervals=intervals,
            )
            summary = ", ".join(f"{figure.replace('_', ' ')} {value:.3f}" for figure, value in values.items())
            self.progress.say(f"step {state.step}: {name}, {condition} image: {summary}")
        self._last = time.monotonic()

    def conclude(self) -> None:
        """Draw the loss curve and print where the results are."""
        if not self.active:
            return
        figure = plot_loss(self.run)
        if self._num_cut or self._num_bad:
            print(f"{self._num_cut} samples were cut to data.max_length, {self._num_bad} left out: {self._list}")
        print(f"run: {self.run}" + (f"  loss curve: {figure}" if figure else ""), flush=True)

    def _list_cut_and_bad(self, step: int, data: StepData) -> None:
        """Append the samples that were cut to length or left out to their list."""
        self._num_cut += len(data.cut)
        self._num_bad += len(data.bad)
        if not (data.cut or data.bad):
            return
        with self._list.open("a", encoding="utf-8") as file:
            for id, num_cut in data.cut:
                file.write(json.dumps({"step": step, "id": id, "tokens_cut": num_cut}) + "\n")
            for id, reason in data.bad:
                file.write(json.dumps({"step": step, "id": id, "left_out": reason}) + "\n")
