"""OpenMP helper threads of threads that have stopped computing."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from babydoctor.runtime import release_team


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_thread_releases_its_helpers_and_can_compute_again():
    outcome: list[tuple[bool, int, int, torch.Tensor]] = []

    def compute() -> None:
        torch.set_num_threads(2)
        numbers = torch.ones(1 << 20)
        numbers.exp()
        with_helpers = len(list(Path("/proc/self/task").iterdir()))
        released = release_team()
        deadline = time.monotonic() + 5
        while (left := len(list(Path("/proc/self/task").iterdir()))) >= with_helpers and time.monotonic() < deadline:
            time.sleep(0.01)
        outcome.append((released, with_helpers, left, numbers.exp()))

    threads_before = torch.get_num_threads()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    torch.set_num_threads(threads_before)
    ((released, with_helpers, left, result),) = outcome
    assert torch.equal(result, torch.ones(1 << 20).exp())
    if not released:
        pytest.skip("torch computes with another OpenMP here")
    assert left < with_helpers
