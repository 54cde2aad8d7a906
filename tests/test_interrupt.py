"""Stop signals at any point of a program, without a model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from babydoctor.train.interrupt import StopSignals, TrainingStopped


def test_before_training_a_signal_ends_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="SIGTERM before training began") as caught, StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal has no effect")
    assert caught.value.exit_status == 143
    assert capfd.readouterr().err == "stopped by SIGTERM before training began; nothing was written\n"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_during_a_step_a_signal_is_recorded_and_a_second_sigint_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        stop.wait_for_steps()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert stop.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("a checkpoint is saved at the end of this step") == 1


def test_the_message_is_printed_before_a_second_signal_can_end_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(TrainingStopped) as caught, StopSignals() as stop:
        stop.wait_for_steps()
        stop.received = signal.SIGTERM  # another rank's signal; this rank's own arrives later
        restored = signal.signal
        messages: list[str] = []

        def record(number: int, handler: Any) -> Any:
            messages.append(capfd.readouterr().err)
            return restored(number, handler)

        monkeypatch.setattr("babydoctor.train.interrupt.signal.signal", record)
        raise stop.stopped_after(7, 9, tmp_path)
    assert caught.value.exit_status == 143
    assert "stopped by SIGTERM after step 7 of 9; a checkpoint is saved" in messages[0]


def test_a_signal_ends_an_evaluation_and_skips_later_ones() -> None:
    done: list[str] = []

    def evaluate() -> None:
        done.append("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("finished")

    with StopSignals() as stop:
        stop.wait_for_steps()
        stop.run_unless_stopped(evaluate)
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm and a launcher may both send it
        stop.run_unless_stopped(evaluate)
        assert stop.received == signal.SIGTERM
    assert done == ["begun"]


def test_a_signal_after_the_last_step_lets_the_run_finish() -> None:
    with StopSignals() as stop:
        stop.wait_for_steps()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
