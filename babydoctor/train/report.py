"""What a run reports while it trains: metrics.jsonl, TensorBoard, wandb, the progress bar and the loss curve."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from babydoctor.config import RunConfig, TrackingConfig
from babydoctor.data.loader import StepData
from babydoctor.eval.report import headline_figures
from babydoctor.files import write_text
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import Cursor
from babydoctor.train.schedule import is_due

SPEED_WINDOW = 20
"""Speeds are means over so many steps."""

LINE_INTERVAL_S = 10.0
"""Where the output is no terminal, a line of progress comes at most this often."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``."""
    return read_json_lines(run / "metrics.jsonl")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file, none where it is not there; a half-written last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Tracker:
    """Writes each record to every place that the configuration names. Only rank 0 has one."""

    def __init__(self, run: Path, config: RunConfig, *, start: int) -> None:
        """Keep the records of the steps before ``start`` and drop those that will be made again."""
        self.run = run
        kept = [record for record in read_metrics(run) if record["step"] <= start]
        write_text(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = _open_tensorboard(run, config.tracking, start)
        self._wandb = _open_wandb(config)

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Write one record; numbers also go to TensorBoard and wandb under ``kind/name``."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_tensorboard(run: Path, tracking: TrackingConfig, start: int) -> Any:
    if not tracking.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tracking.tensorboard=true needs the package tensorboard; install it with "
            "`pip install 'babydoctor[train]'` or set tracking.tensorboard=false"
        ) from error
    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)


def _open_wandb(config: RunConfig) -> Any:
    if config.tracking.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "tracking.wandb_project is set, but wandb is not installed; install it with "
            "`pip install 'babydoctor[wandb]'` or set tracking.wandb_project=null"
        ) from error
    return wandb.init(
        project=config.tracking.wandb_project, name=config.name, config=config.model_dump(), resume="allow"
    )


class StepProgress:
    """A progress bar with loss, speed and time left; plain lines where the output is no terminal."""

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
        self._start, self._begun, self._last_line = start, time.monotonic(), 0.0

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_s: float, samples_per_s: float) -> None:
        """Show that ``step`` steps are done."""
        figures = f"loss {loss:.3f}  {samples_per_s:.1f} samples/s  {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._last_line > LINE_INTERVAL_S or step == self.total:
            self._last_line = time.monotonic()
            passed = self._last_line - self._begun
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
    """Draw ``loss.png``: training loss (thin: each record, thick: smoothed) and held-out loss over steps."""
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
    axes.set(xlabel="optimiser step", ylabel="loss per supervised token (nats)", title=run.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(run / "loss.png", dpi=120)
    return run / "loss.png"


class Reporter:
    """Everything that is said about the run; only the main process's is active, the others' say nothing."""

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

    def __enter__(self) -> Reporter:
        if self.active:
            self.progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.progress.__exit__(None, None, None)
            self.tracker.close()

    def begin(self, model: BabyDoctor, num_samples: int, plan: str) -> None:
        """Say what is about to be done."""
        if not self.active:
            return
        trained = sum(parameter.numel() for parameter in model.trainable_parameters().values())
        resumed = f", resumed after step {self.start}" if self.start else ""
        self.progress.say(f"{num_samples:,} samples, {self.total:,} steps, {trained:,} parameters train{resumed}")
        self.progress.say(plan)
        self._last = time.monotonic()

    def step(self, cursor: Cursor, data: StepData, begun: float, *, loss: float, **values: float) -> None:
        """Record one finished step; speeds count the time that the step waited for data."""
        if not self.active:
            return
        now = time.monotonic()
        self._recent.append((now - self._last, data.num_tokens, data.num_samples))
        waited, self._last = begun - self._last, now
        seconds, tokens, samples = (sum(column) for column in zip(*self._recent, strict=True))
        speeds = {"tokens_per_s": tokens / seconds, "samples_per_s": samples / seconds}
        self._list_losses(cursor.step, data)
        if is_due(self.log_every, cursor.step, self.total):
            record = {"loss": loss, **values, "samples": cursor.samples, "tokens": data.num_tokens, **speeds}
            self.tracker.log("train", cursor.step, **record, data_wait_s=max(0.0, waited))
        self.progress.update(cursor.step, loss=loss, **speeds)

    def held_out(self, cursor: Cursor, loss: float, answers: Sequence[dict[str, str]]) -> None:
        self.tracker.log("eval", cursor.step, loss=loss, answers=list(answers))
        self.progress.say(f"step {cursor.step}: held-out loss {loss:.4f}")
        for item in answers:
            question = " ".join(item["question"].split())
            self.progress.say(f"  {question}\n    answer:    {item['answer']}\n    reference: {item['reference']}")
        self._last = time.monotonic()

    def task(self, cursor: Cursor, name: str, result: Mapping[str, Any]) -> None:
        """Record a task's headline figures under each image condition."""
        for condition, scored in result["conditions"].items():
            figures = {figure: scored["figures"][figure] for figure in headline_figures(result)}
            values = {figure: entry["value"] for figure, entry in figures.items()}
            intervals = {figure: [entry["low"], entry["high"]] for figure, entry in figures.items()}
            self.tracker.log(
                f"task/{condition}",
                cursor.step,
                task=name,
                num_failed=result["num_failed"][condition],
                **values,
                intervals=intervals,
            )
            told = ", ".join(f"{figure.replace('_', ' ')} {value:.3f}" for figure, value in values.items())
            self.progress.say(f"step {cursor.step}: {name}, {condition} image: {told}")
        self._last = time.monotonic()

    def conclude(self) -> None:
        """Draw the loss and say where everything is."""
        if not self.active:
            return
        figure = plot_loss(self.run)
        if self._num_cut or self._num_bad:
            print(f"{self._num_cut} samples were cut to data.max_length, {self._num_bad} left out: {self._list}")
        print(f"run: {self.run}" + (f"  loss curve: {figure}" if figure else ""), flush=True)

    def _list_losses(self, step: int, data: StepData) -> None:
        """List what was cut from samples and which samples were left out."""
        self._num_cut += len(data.cut)
        self._num_bad += len(data.bad)
        if not (data.cut or data.bad):
            return
        with self._list.open("a", encoding="utf-8") as file:
            for id, num_cut in data.cut:
                file.write(json.dumps({"step": step, "id": id, "tokens_cut": num_cut}) + "\n")
            for id, reason in data.bad:
                file.write(json.dumps({"step": step, "id": id, "left_out": reason}) + "\n")
