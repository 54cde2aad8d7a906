"""A worker's requests between HTTP and engine, and the way of events from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from babydoctor.engine.request import Event, GenerationHandle
from babydoctor.serve.api.protocol import GenerateRequest, Usage
from babydoctor.serve.api.streaming import Answer
from babydoctor.serve.worker.resume import ResumedText


@dataclass(eq=False)
class Job:
    """One request between HTTP and engine."""

    answer: Answer
    request: GenerateRequest
    prompt_tokens: int
    resumed: ResumedText | None
    request_id: str
    images: tuple[bytes, ...] = ()
    """Kept only for retention."""
    received_s: float = 0.0
    first_token_s: float | None = None
    text: str = ""
    num_tokens: int = 0
    handle: GenerationHandle | None = None

    def usage(self) -> Usage:
        total = self.prompt_tokens + self.num_tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.num_tokens, total_tokens=total)


class EventPump:
    """Carries events from the engine's thread into the event loop, all of one decode step with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Job, Event], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._events: deque[tuple[Job, Event]] = deque()
        self._is_scheduled = False

    def push(self, job: Job, event: Event) -> None:
        """Called on the engine's thread."""
        self._events.append((job, event))
        if not self._is_scheduled and not self._loop.is_closed():
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        # Cleared first: an event that is pushed from here on schedules another round.
        self._is_scheduled = False
        while self._events:
            self._deliver(*self._events.popleft())
