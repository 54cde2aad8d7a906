"""One part of ``babydoctor serve`` as a child process."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field

PARENT_VARIABLE = "BABYDOCTOR_PARENT_PID"
LOG_LEVEL_VARIABLE = "BABYDOCTOR_LOG_LEVEL"

STEADY_S = 60.0
"""A part that has run for this long is restarted without a growing delay."""

LONGEST_DELAY_S = 30.0


@dataclass(eq=False)
class Child:
    """One part as a child process. ``ready_url`` answers 200 once it works."""

    name: str
    arguments: list[str]
    ready_url: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)
    started_s: float = field(init=False)
    num_early_ends: int = 0
    """How often in a row it has ended within ``STEADY_S``."""
    restart_at_s: float | None = None

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.restart_at_s = None
        self.started_s = time.monotonic()
        # A separate session, so that Ctrl-C reaches only the launcher, which stops the parts in the right order.
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from babydoctor.cli.main import main; main()", *self.arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def plan_restart(self, now_s: float) -> float:
        """Plan the restart of a part that has ended. Returns the delay in seconds.

        The delay doubles while the part ends within ``STEADY_S`` of its start.
        """
        self.num_early_ends = self.num_early_ends + 1 if now_s - self.started_s < STEADY_S else 1
        delay_s = min(LONGEST_DELAY_S, 0.5 * 2 ** (self.num_early_ends - 1))
        self.restart_at_s = now_s + delay_s
        return delay_s

    @property
    def exit_status(self) -> int | None:
        return self.process.poll()

    def terminate(self) -> None:
        """Send SIGTERM, but only once: a second one would stop the part without finishing running answers."""
        if self.exit_status is None:
            self.process.terminate()

    def wait(self, timeout_s: float) -> None:
        """Wait until it ends. Send SIGKILL after ``timeout_s``."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        if self.exit_status is None:
            self.process.kill()
            self.process.wait()
