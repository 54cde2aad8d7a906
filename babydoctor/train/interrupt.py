"""Stop a run by signal: SIGINT (Ctrl-C), SIGTERM, or SIGUSR1, which Slurm usually sends before a time limit.

During a step, a signal asks the loop to save a checkpoint at the end of the step. Before the first step and during
evaluation nothing is lost by stopping, so the signal takes effect at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class TrainingStopped(Exception):
    """A signal ended training before its last step. The message has already been printed to stderr.

    Attributes:
        exit_status: 128 + the signal's number, as shells report it: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class _StopNow(BaseException):
    """Raised by the signal handler if a signal takes effect at once. ``except Exception`` must not catch it."""


class StopSignals:
    """Handles the stop signals inside a ``with`` block and restores the previous handlers after it.

    In any thread but the main one it does nothing, because Python runs signal handlers in the main thread only.

    Attributes:
        received: number of the first stop signal; None before it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_training = False
        self._takes_effect_at_once = True
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Print before restoring the handlers: after that, a second signal may end the process without a message. It
        # often follows, because a launcher signals its ranks one by one and a rank stops on another rank's signal too.
        stopped = error if isinstance(error, TrainingStopped) else None
        if kind is _StopNow:
            assert self.received is not None
            name = signal.Signals(self.received).name
            stopped = TrainingStopped(self.received, f"stopped by {name} before training began; nothing was written")
        if stopped is not None:
            print(stopped, file=sys.stderr, flush=True)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if stopped is not None and stopped is not error:
            raise stopped from None

    def wait_for_steps(self) -> None:
        """From now on a signal takes effect at the end of a step, and a second SIGINT raises ``KeyboardInterrupt``."""
        self._is_training, self._takes_effect_at_once = True, False

    def run_unless_stopped(self, action: Callable[[], None]) -> None:
        """Run ``action`` between two steps. A signal ends it at once and is stored in ``received``."""
        try:
            try:
                self._takes_effect_at_once = True
                if self.received is None:
                    action()
            finally:
                self._takes_effect_at_once = False
        except _StopNow:  # raised once, by the first signal, which may arrive in ``finally`` before the assignment
            self._takes_effect_at_once = False

    def stopped_after(self, step: int, total: int, run: Path) -> TrainingStopped:
        """The exception that ends a run whose checkpoint after ``step`` is saved."""
        assert self.received is not None
        name = signal.Signals(self.received).name
        return TrainingStopped(
            self.received,
            f"stopped by {name} after step {step} of {total}; a checkpoint is saved in {run}. Continue with --resume",
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data loader process, which ends with its parent
            return
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if self._is_training:
            name = signal.Signals(number).name
            again = " Press Ctrl-C again to end at once without saving." if number == signal.SIGINT else ""
            print(f"\n{name}: a checkpoint is saved at the end of this step.{again}", file=sys.stderr, flush=True)
        if self._takes_effect_at_once:
            raise _StopNow
