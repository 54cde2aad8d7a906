"""An occlusion map that is being computed for a tab."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass
class RunningMap:
    """An occlusion map that is being computed.

    Attributes:
        share: share of the work that is done, 0 to 1.
        left_s: seconds left, if known.
        problem: code of the reason if it ended without a map.
    """

    share: float = 0.0
    left_s: float | None = None
    problem: str = ""
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def is_running(self) -> bool:
        return not self.problem and self.task is not None and not self.task.done()

    def cancel(self, problem: str) -> None:
        """Cancel the task. This closes its request, which ends the work in the engine."""
        if self.task is not None and not self.task.done():
            self.problem = problem
            self.task.cancel()
