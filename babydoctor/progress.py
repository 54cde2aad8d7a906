"""Progress bars with the time left, drawn on stderr. They show on a terminal only and disappear when the work ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


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
    """Pass items through and show how many have passed. ``total`` defaults to ``len(items)`` where it has one."""
    with progress_bars() as progress:
        yield from progress.track(items, total=total, description=description)
