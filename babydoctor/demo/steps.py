"""Run the demo's steps: those that use all cores one after the other, the others two at a time.

A step that shares the cores runs in a process of its own with half of them. It gives the same result whether another
step runs beside it or not, because the number of its threads is the same.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from babydoctor.cores import num_cores
from babydoctor.schema import UserError

_CHECK_EVERY_S = 1.0


@dataclass(frozen=True)
class Step:
    """One step of the demo: its description, the file or folder that it writes, and the function that does it.

    Attributes:
        shares_cores: runs in a process of its own, which another such step may run beside. ``run`` is then a function
            of a module, or a ``partial`` of one.
        needs: result of another such step that must be there before this one starts. A step that uses all cores waits
            for all steps before it.
    """

    name: str
    result: Path
    run: Callable[[], object]
    shares_cores: bool = False
    needs: Path | None = None


def run_steps(steps: Sequence[Step], console: Console, prepare: Callable[[], None]) -> None:
    """Run all steps that have no result yet, in order.

    Args:
        prepare: called in each process before it runs its first step.

    Raises:
        UserError: a step failed, or its process was killed. The step that runs beside it is stopped.
    """
    left = []
    for step in steps:
        if step.result.exists():
            console.print(f"[dim]already done: {step.name}[/]")
        else:
            left.append(step)
    for shares_cores, group in itertools.groupby(left, key=lambda step: step.shares_cores):
        if shares_cores:
            _run_side_by_side(list(group), console, prepare)
        else:
            for step in group:
                console.print(f"[bold]{step.name}[/]")
                started = time.monotonic()
                step.run()
                _report_end(step, started, console)


def _run_side_by_side(steps: list[Step], console: Console, prepare: Callable[[], None]) -> None:
    """Run steps in two processes, or in one if there is one core. Each starts as soon as what it needs is there."""
    cores = num_cores()
    waiting, num_processes = list(steps), min(2, cores)
    running: dict[Future[None], tuple[Step, float]] = {}
    most_running = 0
    context = multiprocessing.get_context("spawn")  # a fork would copy the state of the parent's threads
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin, initargs=(prepare,))
    with _threads_per_process(max(1, cores // 2)), pool:
        try:
            while waiting or running:
                ready = [step for step in waiting if step.needs is None or step.needs.exists()]
                for step in ready[: num_processes - len(running)]:
                    console.print(f"[bold]{step.name}[/]")
                    waiting.remove(step)
                    running[pool.submit(_run, step.run)] = step, time.monotonic()
                assert running, waiting
                most_running = max(most_running, len(running))
                done = wait(running, timeout=_CHECK_EVERY_S, return_when=FIRST_COMPLETED).done
                # The pool does not notice the death of a process that it started while it waited for another one.
                if not done and len(multiprocessing.active_children()) < most_running:
                    raise BrokenProcessPool
                for future in done:
                    step, started = running.pop(future)
                    future.result()
                    _report_end(step, started, console)
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "the process of a step was killed; free some memory and run the command again, which continues "
                    "with the steps that are not done"
                ) from error
            raise


def _report_end(step: Step, started: float, console: Console) -> None:
    assert step.result.exists(), step
    console.print(f"[dim]  {step.name.split(':')[0]}: {time.monotonic() - started:.0f} s[/]")


@contextmanager
def _threads_per_process(count: int) -> Iterator[None]:
    """Give each process that starts in the block ``count`` threads for matrix products, unless the user has chosen."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _begin(prepare: Callable[[], None]) -> None:
    """Set up a process. Ctrl-C ends it through its parent, and it prints lines: two processes cannot share a bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TTY_COMPATIBLE"] = "0"  # for rich
    prepare()


def _run(step: Callable[[], object]) -> None:
    """Run a step. What it returns is not sent back: its result is the file that it writes."""
    step()
