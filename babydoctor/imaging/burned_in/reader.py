"""The owner's side of the processes that read text."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.cores import num_cores
from babydoctor.imaging.burned_in.boxes import TextBox, widen
from babydoctor.imaging.burned_in.kinds import kind_of
from babydoctor.schema import UserError

SEARCH_SECONDS = 60.0
"""Limit of CPU seconds for one picture. A picture of 2000 x 2000 pixels full of text takes about ten."""

_START_SECONDS = 120.0


class TextSearchError(UserError):
    """The search for text failed, so nothing is known about the picture."""


def is_available() -> bool:
    """True if the extra ``ocr`` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("rapidocr", "onnxruntime"))


def find_text(image: Image.Image, *, seconds: float = SEARCH_SECONDS) -> list[TextBox]:
    """Find the texts in an RGB picture with this process's reader. Identifying boxes on one line are joined.

    Raises:
        TextSearchError: the extra ``ocr`` is not installed, or the search failed or took longer than ``seconds`` of
            CPU time.
    """
    return _reader_of(os.getpid()).find(image, seconds=seconds)


class TextReader:
    """Up to ``size`` processes that read text, started when first needed. Thread-safe.

    Args:
        size: number of processes; None: one.
        num_threads: threads of each process; None: the cores divided by ``size``.
    """

    def __init__(self, size: int | None = None, num_threads: int | None = None) -> None:
        self.size = size or 1
        self.num_threads = num_threads or max(1, num_cores() // self.size)
        self._free = threading.Semaphore(self.size)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    def find(self, image: Image.Image, *, seconds: float = SEARCH_SECONDS) -> list[TextBox]:
        """See ``find_text``."""
        self.check()
        with self._process() as process:
            found = process.read(np.asarray(image.convert("RGB")), seconds)
        boxes = [
            TextBox(left, top, right, bottom, kind, score, text)
            for left, top, right, bottom, text, score in found
            if right > left and bottom > top and (kind := kind_of(text, score)) is not None
        ]
        return widen(boxes, image.width, image.height)

    def check(self) -> None:
        """Raise ``TextSearchError`` if the extra ``ocr`` is not installed."""
        if not is_available():
            raise TextSearchError("reading text in images needs the extra ocr: pip install 'babydoctor[ocr]'")

    def close(self) -> None:
        """End the idle processes."""
        with self._lock:
            processes, self._idle = self._idle, []
        for process in processes:
            process.kill()

    @contextlib.contextmanager
    def _process(self) -> Iterator[_Process]:
        with self._free:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            process = process or _Process(self.num_threads)
            try:
                yield process
            except BaseException:  # the process is in an unknown state
                process.kill()
                raise
            with self._lock:
                self._idle.append(process)


class _Process:
    """One process, which reads one picture at a time."""

    def __init__(self, num_threads: int) -> None:
        ours, theirs = socket.socketpair()
        package_root = str(Path(__file__).parents[3])
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
        python_path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "babydoctor.imaging.burned_in.child", str(theirs.fileno()), str(num_threads)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=kept | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": str(num_threads)},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._receive(_START_SECONDS, "it did not start")

    def read(self, pixels: np.ndarray, seconds: float) -> Any:
        """Call ``child._read`` in the process, for pixels ``uint8 [H, W, 3]``."""
        header = {"height": pixels.shape[0], "width": pixels.shape[1], "seconds": seconds}
        try:
            self._connection.send_bytes(json.dumps(header).encode())
            self._connection.send_bytes(np.ascontiguousarray(pixels).reshape(-1).data)
        except OSError:
            raise TextSearchError("the search for text failed: its process has ended") from None
        # Wait longer than the limit of CPU time, because the process may not run all the time on a busy machine.
        return self._receive(4 * seconds + 5, f"it took longer than {seconds:g} s of CPU time, or crashed")

    def _receive(self, seconds: float, problem: str) -> Any:
        try:
            if self._connection.poll(seconds):
                return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            pass
        raise TextSearchError(f"the search for text failed: {problem}")

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        self._connection.close()


@lru_cache(maxsize=1)
def _reader_of(pid: int) -> TextReader:
    reader = TextReader()
    atexit.register(reader.close)
    return reader
