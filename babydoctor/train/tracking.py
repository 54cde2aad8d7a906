"""What a run reports while it trains: metrics.jsonl, TensorBoard, wandb, the progress bar and the loss curve."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from babydoctor.config import RunConfig, TrackingConfig
from babydoctor.model.checkpoint import write_text
from babydoctor.schema import UserError

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
                TextColumn("{task.description}"),
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
