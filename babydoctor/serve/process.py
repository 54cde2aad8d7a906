"""One part of ``babydoctor serve`` as a child process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

PARENT_VARIABLE = "BABYDOCTOR_PARENT_PID"
LOG_LEVEL_VARIABLE = "BABYDOCTOR_LOG_LEVEL"


@dataclass(eq=False)
class Child:
    """One part as a child process. ``ready_url`` answers 200 once it works."""

    name: str
    arguments: list[str]
    ready_url: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)
    num_restarts: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        # In its own session, so that Ctrl-C reaches only the launcher, which stops the parts in the right order.
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from babydoctor.cli.main import main; main()", *self.arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def exit_status(self) -> int | None:
        return self.process.poll()

    def terminate(self) -> None:
        """Send SIGTERM once. A second one would stop it at once, without finishing running answers."""
        if self.exit_status is None:
            self.process.terminate()

    def wait(self, patience_s: float) -> None:
        """Wait until it ends. Send SIGKILL after ``patience_s``."""
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        if self.exit_status is None:
            self.process.kill()
            self.process.wait()
