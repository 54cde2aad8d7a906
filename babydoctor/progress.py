"""Progress bars with the time left, on stderr. They appear on a terminal only and disappear when the work ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

_SHOW_AFTER_S = 5.0
_LOG_EVERY_S = 15.0
_SHORTEST_S = 1.0
"""Time from which the time left is estimated."""


def progress_bars(*, in_bytes: bool = False) -> Progress:
    """Return a ``rich`` progress display to use as a context manager and to add tasks to.

    Args:
        in_bytes: the tasks count bytes; the bars then show sizes and the transfer rate.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counts,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def show_progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how many are done. ``total`` defaults to ``len(items)`` if it has a length."""
    with progress_bars() as progress:
        yield from progress.track(items, total=total, description=description)


@contextmanager
def named_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``update(description, done, total)``. Each description has its own bar.

    A log file gets a line with the time left every ``_LOG_EVERY_S`` seconds.
    """
    tasks: dict[str, Any] = {}
    started: dict[str, tuple[float, int]] = {}
    logged = time.monotonic()

    def update(description: str, done: int, total: int) -> None:
        nonlocal logged
        now = time.monotonic()
        if description not in tasks:
            tasks[description] = bars.add_task(description, total=total)
            started[description] = now, done  # the first item's time is unknown: loading may have come before it
        bars.update(tasks[description], completed=done)
        if bars.disable and now - logged > _LOG_EVERY_S:
            logged = now
            start, done_before = started[description]
            text = f"{description}: {done} of {total}"
            if done > done_before and now - start > _SHORTEST_S:  # items of one batch end together
                text += f", about {(total - done) * (now - start) / (done - done_before):.0f} s left"
            print(text, file=sys.stderr, flush=True)

    with progress_bars() as bars:
        yield update


def loss_progress(description: str, total: int) -> Iterator[Callable[[float], None]]:
    """Yield ``total`` times a function that takes the loss of a step. Prints the smoothed loss at the end."""
    smoothed: float | None = None

    def report(loss: float) -> None:
        nonlocal smoothed
        smoothed = loss if smoothed is None else 0.95 * smoothed + 0.05 * loss

    with named_progress() as update:
        for step in range(1, total + 1):
            yield report
            update(description, step, total)
    if smoothed is not None:
        print(f"{description}: loss {smoothed:.3f} after {total} steps", file=sys.stderr, flush=True)


class ByteProgress:
    """Shows the bytes done and the time left on stderr, once the work has taken five seconds.

    A terminal gets a bar that disappears at the end. A log file gets a line every ``_LOG_EVERY_S`` seconds.
    """

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = total
        self._done = 0
        self._skipped = 0
        self._start = time.monotonic()
        self._logged = self._start - _LOG_EVERY_S + _SHOW_AFTER_S
        self._bars = progress_bars(in_bytes=True)
        self._task: Any = None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def skip(self, num_bytes: int) -> None:
        """Count bytes that were done earlier. They do not affect the estimate of the time left."""
        self._skipped += num_bytes

    def advance(self, num_bytes: int) -> None:
        """Count bytes that are done now."""
        self._done += num_bytes
        now = time.monotonic()
        done = min(self._done + self._skipped, self.total)
        if not self._bars.disable:
            if self._task is None and now - self._start > _SHOW_AFTER_S:
                self._task = self._bars.add_task(self.description, total=self.total)
                self._bars.start()
            if self._task is not None:
                self._bars.update(self._task, completed=done)
        elif now - self._logged > _LOG_EVERY_S and self._done:
            self._logged = now
            left = (self.total - done) * (now - self._start) / self._done
            text = f"{self.description}: {done / 1e9:.1f} of {self.total / 1e9:.1f} GB, about {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)
