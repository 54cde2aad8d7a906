"""The owner's side of one decoding process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from babydoctor.errors import UserErrorCode
from babydoctor.imaging.limits import DecodeLimits, ImageError

FREE_BYTES = 96 * 2**20
"""Memory in bytes that each process may use without asking, enough for an ordinary image."""

_START_SECONDS = 120
_KEPT_SHARED_BYTES = 16 * 2**20  # more is released after each image
_KEPT_GROWTH_BYTES = 256 * 2**20  # a process that grows by more than this is replaced


class DecodeProcess:
    """One decoding process, for one request at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._shared = os.memfd_create("babydoctor-pixels") if hasattr(os, "memfd_create") else _temporary_file()
        self.is_alive = True
        package_root = str(Path(__file__).parents[3])
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
        environment = kept | {
            "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # Keep pictures of up to 32 MB on the heap: mapping new pages takes as long as decoding a JPEG.
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(2**25),
            "MALLOC_TRIM_THRESHOLD_": str(2**26),
        }
        command = [sys.executable, "-m", "babydoctor.imaging.isolation.child", str(theirs.fileno()), str(self._shared)]
        with theirs, tempfile.TemporaryFile() as errors:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                pass_fds=(theirs.fileno(), self._shared),
                # Ctrl-C and Slurm signal the whole process group, but a run that ends still reads images.
                start_new_session=True,
            )
            theirs.close()
            try:
                self._base_bytes = int(self._receive(time.monotonic() + _START_SECONDS)["resident"])
            except (OSError, EOFError) as error:
                self.kill()
                errors.seek(0)
                reason = errors.read()[-500:].decode(errors="replace").strip()
                raise ImageError(
                    f"the decoding process did not start ({reason or error})", "image_decoder_down"
                ) from None

    @property
    def pid(self) -> int:
        return self._child.pid

    def decode(
        self, data: bytes, name: str, request: dict[str, Any], limits: DecodeLimits, memory: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """See ``DecodePool.decode``. ``memory`` is the pool's context manager that reserves memory."""
        seconds = limits.seconds
        try:
            self._send({"name": name, "limits": asdict(limits), **request}, data)
            answer = self._receive(_deadline(2 * seconds))
            if "need" in answer:
                num_pixels, bytes_per_pixel = answer["need"]
                seconds = limits.seconds_for(num_pixels)
                with memory(num_pixels * bytes_per_pixel):
                    self._send({"go": True}, b"")
                    answer = self._receive(_deadline(seconds))
            values = self._read_values(answer) if "shape" in answer else None
        except TimeoutError:
            self.kill()
            raise _timeout(name, seconds) from None
        except (OSError, EOFError, ValueError, TypeError):
            raise self._death(name, seconds) from None
        if "error" in answer:
            raise ImageError(str(answer["error"]), cast(UserErrorCode, answer["code"]))
        if answer["resident"] > self._base_bytes + _KEPT_GROWTH_BYTES:
            self.kill()
        assert values is not None
        return values, answer["info"]

    def _read_values(self, answer: dict[str, Any]) -> np.ndarray:
        values = np.empty([int(edge) for edge in answer["shape"]], np.dtype(answer["dtype"]))
        view, done = memoryview(values.data).cast("B"), 0
        while done < len(view):
            count = os.preadv(self._shared, [view[done:]], done)
            if count == 0:
                raise EOFError
            done += count
        if len(view) > _KEPT_SHARED_BYTES:
            os.ftruncate(self._shared, 0)
        return values

    def _send(self, message: dict[str, Any], data: bytes) -> None:
        text = json.dumps(message).encode()
        self._socket.settimeout(_deadline(10) - time.monotonic())
        self._socket.sendall(struct.pack("!IQ", len(text), len(data)) + text)
        self._socket.sendall(data)

    def _receive(self, deadline: float) -> dict[str, Any]:
        (length,) = struct.unpack("!I", self._receive_bytes(4, deadline))
        return cast("dict[str, Any]", json.loads(self._receive_bytes(length, deadline)))

    def _receive_bytes(self, count: int, deadline: float) -> bytes:
        received = b""
        while len(received) < count:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._socket.recv(count - len(received))
            if not piece:
                raise EOFError("the process has ended")
            received += piece
        return received

    def _death(self, name: str, seconds: float) -> ImageError:
        """The error for a process that ended during a request."""
        self.is_alive = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        code = self._child.returncode
        self.kill()
        if code in (-signal.SIGPROF, -signal.SIGXCPU):
            return _timeout(name, seconds)
        return ImageError(f"{name}: the decoder crashed on this image (exit status {code})", "image_decode_failed")

    def kill(self) -> None:
        """End the process and release its socket and memory."""
        self.is_alive = False
        self._child.kill()
        self._child.wait()
        self._socket.close()
        if self._shared >= 0:
            os.close(self._shared)
            self._shared = -1


def _temporary_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _deadline(seconds: float) -> float:
    """When to stop waiting for a process that may use ``seconds`` of CPU time on a busy machine."""
    return time.monotonic() + 4 * seconds + 5


def _timeout(name: str, seconds: float) -> ImageError:
    return ImageError(f"{name}: decoding took longer than the limit of {seconds:g} s", "image_decode_timeout")
