"""Check whether a worker can answer: its engine must be alive, and preprocessing must make progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from babydoctor.imaging.isolation import DecodePool

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine


class Progress:
    """Measures for how long no job has ended while jobs are running. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_jobs = 0
        self._last_s = time.monotonic()

    @contextmanager
    def job(self) -> Iterator[None]:
        """Context manager around one job."""
        with self._lock:
            if not self._num_jobs:
                self._last_s = time.monotonic()
            self._num_jobs += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_jobs -= 1
                self._last_s = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since a job last ended or the first one began; 0 if no job is running."""
        with self._lock:
            return time.monotonic() - self._last_s if self._num_jobs else 0.0


class Health:
    """Finds the reason why a worker cannot answer.

    Args:
        stuck_s: see ``Limits``.
    """

    def __init__(self, engine: Engine, decoders: DecodePool, stuck_s: float) -> None:
        self.preparing = Progress()
        self._engine = engine
        self._decoders = decoders
        self._stuck_s = stuck_s

    def problem(self) -> str | None:
        """The problem as text; None if there is none. Does not block."""
        if not self._engine.healthy:
            return "The engine has stopped; restart the worker."
        if self._engine.seconds_in_step > self._stuck_s:
            return f"The engine has been stuck in one step for more than {self._stuck_s:g} s; restart the worker."
        if self.preparing.silent_s > self._stuck_s:
            return f"No image has been decoded for {self._stuck_s:g} s although some wait; restart the worker."
        if self._decoders.is_down:
            return "No decoding process can be started; see the log, and check memory and the limit of processes."
        return None

    def retry_decoders(self) -> None:
        """If the last attempt to start a decoding process failed, try again."""
        if self._decoders.is_down:
            self._decoders.try_start()
