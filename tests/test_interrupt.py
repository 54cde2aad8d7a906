"""Stop signals at any point of a program, without a model."""

from __future__ import annotations

import os
import signal

import pytest

from babydoctor.train.interrupt import StopSignals, TrainingStopped


def test_before_training_a_signal_ends_the_block() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="SIGTERM before training began") as caught, StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal has no effect")
    assert caught.value.exit_status == 143
    assert signal.getsignal(signal.SIGTERM) is handler


def test_while_steps_run_a_signal_is_noted_and_a_second_sigint_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        stop.wait_for_steps()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert stop.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("a checkpoint is saved at the end of this step") == 1


def test_an_evaluation_is_cut_short_once_and_then_skipped() -> None:
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
