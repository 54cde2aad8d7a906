"""Stopping a run by signal: SIGINT (Ctrl-C), SIGTERM and SIGUSR1, Slurm's usual warning before a time limit.

While steps run, a signal asks the loop to save a checkpoint at the end of the step. Before the first step, and while
held-out answers are made, there is nothing to wait for and the signal takes effect at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class TrainingStopped(Exception):
    """A signal ended training before its last step.

    Attributes:
        exit_status: 128 + the signal's number, as shells report it: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class _StopNow(BaseException):
    """Raised by the signal handler where a signal takes effect at once. No ``except Exception`` may swallow it."""


class StopSignals:
    """Handles the stop signals inside a ``with`` block and restores the previous handlers after it.

    Python runs signal handlers in the main thread only; in another thread this does nothing.

    Attributes:
        received: the number of the first stop signal, None while there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._waits_for_step = False
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is _StopNow:
            assert self.received is not None
            name = signal.Signals(self.received).name
            message = f"stopped by {name} before training began; nothing was written"
            raise TrainingStopped(self.received, message) from None

    @contextlib.contextmanager
    def wait_for_step(self) -> Iterator[None]:
        """Inside the block a signal waits for the end of the step. A second SIGINT raises ``KeyboardInterrupt``."""
        self._waits_for_step = True
        try:
            yield
        finally:
            self._waits_for_step = False

    def run_unless_stopped(self, action: Callable[[], None]) -> None:
        """Run ``action`` inside a ``wait_for_step`` block. A signal ends it at once and is then in ``received``."""
        self._waits_for_step = False
        try:
            if self.received is None:
                action()
        except _StopNow:
            pass
        finally:
            self._waits_for_step = True

    def stopped_after(self, step: int, total: int, run: Path) -> TrainingStopped:
        """The error that ends a run whose state after ``step`` is saved."""
        assert self.received is not None
        name = signal.Signals(self.received).name
        return TrainingStopped(
            self.received,
            f"stopped by {name} after step {step} of {total}; a checkpoint is saved in {run}. Continue with --resume",
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data loader process; it ends with this one
            return
        first = self.received is None
        if first:
            self.received = number
        if not self._waits_for_step:
            raise _StopNow
        if first:
            name = signal.Signals(number).name
            again = " Press Ctrl-C again to end at once without saving." if number == signal.SIGINT else ""
            print(f"\n{name}: a checkpoint is saved at the end of this step.{again}", file=sys.stderr, flush=True)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
