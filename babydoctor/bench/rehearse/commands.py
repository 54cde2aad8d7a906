"""Run one command of the project in its own process and measure its time and peak memory."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

CLI = (sys.executable, "-c", "from babydoctor.cli.main import main; main()")
TAIL_LINES = 12
LINE_CHARS = 200
_ERROR_LINE = re.compile(r"(\w+\.)*(\w*(Error|Exception)|error)\b.*")
PROGRESS_EVERY_S = 30.0
STOP_TIMEOUT_S = 90.0


class StepError(Exception):
    """A command failed or its result is wrong; the message says how."""


@dataclass(frozen=True)
class FinishedProcess:
    """The result of a process.

    ``peak_bytes`` is the largest resident size of the process or one of its children. The kernel also counts the parent
    between fork and exec, so the rehearsal's own process imports nothing large.
    """

    status: int
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str

    def tail(self) -> str:
        """The last lines of the output, with stderr last."""
        lines = [line for text in (self.stdout, self.stderr) for line in text.rstrip().splitlines()]
        return "\n".join(line[:LINE_CHARS] for line in lines[-TAIL_LINES:])

    def error(self) -> str:
        """The exit status, and the line of the output that says what went wrong."""
        lines = self.stderr.strip().splitlines() or self.stdout.strip().splitlines() or ["no output"]
        line = next((line for line in reversed(lines) if _ERROR_LINE.match(line)), lines[-1])
        return f"exit status {self.status}: {line[:LINE_CHARS]}"


class Process:
    """A child process that leads a process group, with its output in two files.

    Args:
        log: path without suffix; ``.out`` and ``.err`` are added.
        num_threads: OpenMP threads; None: as many as there are cores.
    """

    def __init__(self, arguments: Sequence[str], log: Path, num_threads: int | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "COLUMNS": "200",
        }
        if num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(num_threads)
        self._finished: FinishedProcess | None = None
        self.begun = time.monotonic()
        with self._file(".out").open("wb") as out, self._file(".err").open("wb") as err:
            self._child = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )

    def poll(self) -> FinishedProcess | None:
        """The result once the process has ended."""
        if self._finished is not None:
            return self._finished
        pid, status, usage = os.wait4(self._child.pid, os.WNOHANG)
        if pid == 0:
            return None
        self._child.returncode = os.waitstatus_to_exitcode(status)
        self._kill_group()  # data workers of a killed training process
        self._finished = FinishedProcess(
            status=self._child.returncode,
            seconds=time.monotonic() - self.begun,
            peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            stdout=self._file(".out").read_text(encoding="utf-8", errors="replace"),
            stderr=self._file(".err").read_text(encoding="utf-8", errors="replace"),
        )
        return self._finished

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process alone, unless it has ended."""
        if self._finished is None:
            os.kill(self._child.pid, number)

    def stop(self) -> FinishedProcess:
        """End the process with SIGTERM, like a service manager; kill it if it does not end."""
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while (finished := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        return finished

    def last_line(self) -> str:
        """The newest line of the output, for a progress message."""
        newest = max((self._file(".out"), self._file(".err")), key=lambda path: path.stat().st_mtime)
        lines = newest.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def _file(self, suffix: str) -> Path:
        return self.log.with_name(self.log.name + suffix)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)


def run_process(
    arguments: Sequence[str],
    log: Path,
    *,
    console: Console,
    limit_s: float,
    num_threads: int | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> FinishedProcess:
    """Run a program to its end.

    Args:
        limit_s: the program is killed after this many seconds.
        kill_when: SIGKILL is sent as soon as this is true.

    Raises:
        StepError: it took longer than ``limit_s``.
    """
    process = Process(arguments, log, num_threads)
    said = process.begun
    killed = False
    try:
        while (finished := process.poll()) is None:
            now = time.monotonic()
            if now - process.begun > limit_s:
                raise StepError(f"still running after {limit_s:.0f} s; last line: {process.last_line()}")
            if kill_when is not None and not killed and kill_when():
                process.send(signal.SIGKILL)
                killed = True
            if now - said > PROGRESS_EVERY_S:
                console.print(
                    f"    {now - process.begun:.0f} s: {process.last_line()[:150]}", markup=False, style="dim"
                )
                said = now
            time.sleep(0.01)
    except BaseException:
        process.send(signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.01)
        raise
    return finished


def cli(*arguments: str | Path | int) -> list[str]:
    """The ``babydoctor`` command of this environment and this source tree."""
    return [*CLI, *map(str, arguments)]


def python_module(name: str, *arguments: str | Path) -> list[str]:
    """A module of this project run as a program."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def shown(arguments: Sequence[str], root: Path) -> str:
    """A command as a user would type it, with paths below ``root`` shortened."""
    words = (
        ["babydoctor", *arguments[len(CLI) :]] if tuple(arguments[: len(CLI)]) == CLI else ["python", *arguments[1:]]
    )
    return shlex.join(words).replace(f"{root}/", "")
