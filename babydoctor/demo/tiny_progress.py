"""A progress bar over training steps, with the loss and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def steps(name: str, count: int) -> Iterator[Callable[[float], None]]:
    """Yield ``count`` times a function that takes the step's loss; the bar moves on after each."""
    columns = (
        TextColumn(f"{name:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=2) as progress:
        task = progress.add_task(name, total=count, loss=float("nan"))
        smoothed: float | None = None

        def report(loss: float) -> None:
            nonlocal smoothed
            smoothed = loss if smoothed is None else 0.95 * smoothed + 0.05 * loss
            progress.update(task, loss=smoothed)

        for _ in range(count):
            yield report
            progress.advance(task)
