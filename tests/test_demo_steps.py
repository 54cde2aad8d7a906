"""The demo's steps side by side: order, threads, errors, a killed process and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from babydoctor.demo import steps
from babydoctor.demo.steps import Step, run_steps
from babydoctor.schema import UserError

HOUR = 3600

END_S = 120
"""Far more than the end takes on a busy machine."""


def shared(name: str, result: Path, run: Callable[[], object], needs: Path | None = None) -> Step:
    return Step(name, result, run, shares_cores=True, needs=needs)


def write_when_there(result: Path, other: Path) -> None:
    """Write a result once ``other`` is there."""
    while not other.exists():
        time.sleep(0.01)
    result.write_text(f"{os.environ['OMP_NUM_THREADS']} {os.getpid()}")


def write_own(result: Path, before: Path | None = None) -> None:
    """Write the number of threads and the process."""
    assert before is None or before.exists()
    result.write_text(f"{os.environ['OMP_NUM_THREADS']} {os.getpid()}")


def fail(beside: Path) -> None:
    """Fail once the other step runs."""
    while not beside.exists():
        time.sleep(0.01)
    raise UserError("no training case")


def be_killed(beside: Path) -> None:
    while not beside.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def start_and_wait(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(HOUR)


def nothing() -> None:
    """Needs no preparation."""


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_steps_share_the_cores_and_start_when_what_they_need_is_there(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(steps, "num_cores", lambda: cores)
    first, second, third, alone = (tmp_path / name for name in ("first", "second", "third", "alone"))
    # With two processes, the first step waits for the third: they run at the same time.
    run = partial(write_own, first) if cores == 1 else partial(write_when_there, first, third)
    order = [
        shared("first: a", first, run),
        shared("second: b", second, partial(write_own, second, first), needs=first),
        shared("third: c", third, partial(write_own, third)),
        Step("alone", alone, lambda: alone.write_text(str(os.getpid()))),
    ]
    run_steps(order, Console(), nothing)
    threads, processes = zip(*(path.read_text().split() for path in (first, second, third)), strict=True)
    assert set(threads) == {str(max(1, cores // 2))} and len(set(processes)) == min(2, cores)
    assert alone.read_text() == str(os.getpid()) not in processes
    assert "OMP_NUM_THREADS" not in os.environ
    shown = capsys.readouterr().out.splitlines()
    names = ["first: a", "second: b", "third: c"] if cores == 1 else ["first: a", "third: c", "second: b"]
    assert [line for line in shown if ": " in line and not line.startswith(" ")] == names
    assert "alone: " in shown[-1]
    run_steps(order, Console(), nothing)
    assert capsys.readouterr().out.splitlines() == [f"already done: {step.name}" for step in order]


@pytest.mark.parametrize(("breaks", "message"), [(fail, "no training case"), (be_killed, "was killed.*again")])
def test_an_error_in_one_step_ends_the_other(
    breaks: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "num_cores", lambda: 2)
    started = tmp_path / "started"
    order = [
        shared("long", tmp_path / "long", partial(start_and_wait, started)),
        shared("broken", tmp_path / "broken", partial(breaks, started)),
        shared("later", tmp_path / "later", partial(write_own, tmp_path / "later")),
    ]
    with pytest.raises(UserError, match=message):
        run_steps(order, Console(), nothing)
    assert has_ended(int(started.read_text())) and not (tmp_path / "later").exists()


def test_ctrl_c_ends_both_steps(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    script = f"""
import sys
from functools import partial
from pathlib import Path
from rich.console import Console
from babydoctor.demo import steps
from test_demo_steps import nothing, shared, start_and_wait
steps.num_cores = lambda: 2
try:
    steps.run_steps(
        [shared(name, Path(name), partial(start_and_wait, Path(name))) for name in {[str(file) for file in files]!r}],
        Console(),
        nothing,
    )
except KeyboardInterrupt:
    sys.exit(130)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    program = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Background jobs of a shell ignore SIGINT, and children inherit that, but Ctrl-C must work here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not all(file.exists() and file.read_text() for file in files):
            assert program.poll() is None, program.communicate()
            time.sleep(0.02)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        _, errors = program.communicate(timeout=END_S)
    finally:
        program.kill()
    assert program.returncode == 130 and errors == ""
    assert all(has_ended(int(file.read_text())) for file in files)


def has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False
