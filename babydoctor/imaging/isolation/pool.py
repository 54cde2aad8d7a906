"""A pool of decoding processes for any number of threads, with a memory budget that they share."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from babydoctor.cores import num_cores
from babydoctor.imaging.isolation.process import DecodeProcess
from babydoctor.imaging.limits import DecodeLimits, ImageError

MEMORY_BUDGET = 2**30
"""Bytes that large images may need together while they are decoded. A larger one is decoded alone."""


class DecodePool:
    """Up to ``size`` decoding processes, started when first needed. Thread-safe."""

    def __init__(
        self,
        size: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
        large_images: AbstractContextManager[Any] | None = None,
    ) -> None:
        """``large_images`` is held while a large image is decoded: a lock that several processes with a pool share."""
        self._large_images = large_images or contextlib.nullcontext()
        self.size = size or min(4, num_cores())
        self.memory_budget = memory_budget
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._idle: list[DecodeProcess] = []
        self._num_busy = 0
        self._reserved = 0
        self._start_failed = False

    def decode(
        self, data: bytes, name: str, request: dict[str, Any], limits: DecodeLimits
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """(values, ``image.info``) of an image. Waits for a free process and for memory.

        Raises:
            ImageError: the image cannot be decoded within the limits.
        """
        process = self._take()
        try:
            values, info = process.decode(data, name, request, limits, self._memory)
        except ImageError:
            raise
        except BaseException:  # the process is in an unknown state
            process.kill()
            raise
        finally:
            self._give_back(process)
        return values, info

    @property
    def is_down(self) -> bool:
        """True if the last attempt to start a process failed and none is idle."""
        with self._changed:
            return self._start_failed and not self._idle

    def try_start(self) -> None:
        """Start a process if none is idle. ``is_down`` tells whether that worked."""
        with contextlib.suppress(ImageError):
            self._give_back(self._take())

    def _take(self) -> DecodeProcess:
        with self._changed:
            while not self._idle and self._num_busy >= self.size:
                self._changed.wait()
            self._num_busy += 1
            if self._idle:
                return self._idle.pop()
        try:
            process = DecodeProcess()
        except BaseException as error:
            with self._changed:
                self._start_failed = True
                self._num_busy -= 1
                self._changed.notify()
            if isinstance(error, OSError):  # no memory, no file handle or no process left for it
                text = f"the decoding process did not start ({error.strerror})"
                raise ImageError(text, "image_decoder_down") from error
            raise
        self._start_failed = False
        return process

    def _give_back(self, process: DecodeProcess) -> None:
        with self._changed:
            self._num_busy -= 1
            if process.is_alive:
                self._idle.append(process)
            self._changed.notify_all()

    @contextlib.contextmanager
    def _memory(self, num_bytes: int) -> Iterator[None]:
        """Reserve memory, and wait until it fits into the budget."""
        with self._changed:
            while self._reserved and self._reserved + num_bytes > self.memory_budget:
                self._changed.wait()
            self._reserved += num_bytes
        try:
            with self._large_images:
                yield
        finally:
            with self._changed:
                self._reserved -= num_bytes
                self._changed.notify_all()

    def close(self) -> None:
        """End the idle processes. Does nothing in a process that was forked from the pool's owner."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            processes, self._idle = self._idle, []
        for process in processes:
            process.kill()
