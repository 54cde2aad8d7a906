"""Turn the engine's events for a request into an answer."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from babydoctor.engine.request import Delta, Event, Finished, GenerationHandle, TokenLogprob, Usage
from babydoctor.serve.api.errors import ApiError, model_failed_error
from babydoctor.serve.api.protocol import GenerateRequest
from babydoctor.serve.api.responses import late_error
from babydoctor.serve.api.streaming import AnswerDelta, AnswerStream
from babydoctor.serve.worker.preprocess import api_error
from babydoctor.serve.worker.resume import ResumedText

_WAITED = "The model is busy: the request waited too long for its turn. Please try again soon."


@dataclass(eq=False)
class AnsweredRequest:
    """One request between HTTP and engine. Only the event loop's thread calls its methods."""

    answer: AnswerStream
    request: GenerateRequest
    prompt_tokens: int
    resumed: ResumedText | None
    request_id: str
    images: tuple[bytes, ...] = ()
    """Empty unless requests are retained on disk."""
    received_s: float = 0.0
    first_token_s: float | None = None
    text: str = ""
    num_tokens: int = 0
    cached_tokens: int = 0
    handle: GenerationHandle | None = None
    certainty: dict[str, Any] = field(default_factory=dict)
    """Results for the last delta."""
    confidence_of: Callable[[Sequence[TokenLogprob], bool], dict[str, Any]] | None = None
    """(tokens, True if they are the whole answer) -> confidence. None: the request does not ask for it."""
    scored: list[TokenLogprob] = field(default_factory=list)
    """All tokens so far, if the request asks for confidence."""

    def take_delta(self, delta: Delta) -> None:
        """Append new tokens to the answer."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self.num_tokens += len(delta.token_ids)
        text = delta.text if self.resumed is None else self.resumed.add(delta.token_ids)
        if self.confidence_of is not None:
            self.scored += delta.logprobs
        self._put(AnswerDelta(text, token_ids=delta.token_ids, logprobs=self._asked_for(delta.logprobs)))
        if self.resumed is not None and self.resumed.ended and self.handle is not None:
            # The stop string began in the lost worker's tokens, so the engine saw only its end and continued.
            self._end("stop")
            self.handle.cancel()

    def take_end(self, finished: Finished) -> None:
        """End the answer after the engine's last event."""
        reason = finished.finish_reason
        self.cached_tokens = finished.usage.cached_tokens
        if self.resumed is not None:
            self._put(AnswerDelta(self.resumed.flush()))
        elif reason in ("stop", "length"):
            self.num_tokens = finished.usage.completion_tokens
        if reason in ("stop", "length"):
            self._end(reason)
        elif reason == "deadline":
            # A request that never started to run is reported as overload, not as a failure of the server.
            has_waited = finished.queue_s >= finished.total_s
            self.answer.fail(ApiError("queue_full", _WAITED) if has_waited else late_error())
        elif reason == "error":
            self.answer.fail(model_failed_error() if finished.error is None else api_error(finished.error))
        self.answer.finish()

    def _asked_for(self, logprobs: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
        """The alternatives that the client asked for; confidence may need more of them."""
        if not self.request.logprobs:
            return ()
        num_top = int(self.request.logprobs) - 1
        return tuple(dataclasses.replace(token, top=token.top[:num_top]) for token in logprobs)

    def _put(self, delta: AnswerDelta) -> None:
        if not self.answer.ended:
            self.text += delta.text
            self.answer.put(delta)

    def _end(self, reason: str) -> None:
        usage = Usage(self.prompt_tokens, self.num_tokens, self.cached_tokens)
        certainty = dict(self.certainty)
        if self.confidence_of is not None:
            certainty["confidence"] = self.confidence_of(self.scored, reason == "stop" and self.resumed is None)
        self._put(AnswerDelta(finish_reason=reason, usage=usage, certainty=certainty))
        self.answer.finish()


class EventPump:
    """Passes events from the engine's thread to the event loop, which it wakes up once per decoding step.

    A wake-up writes to a socket and releases the interpreter lock meanwhile. One for each event would let the event
    loop run in between and handle the step's events one by one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[AnsweredRequest, Event], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._events: deque[tuple[AnsweredRequest, Event]] = deque()
        self._is_scheduled = False

    def push(self, request: AnsweredRequest, event: Event) -> None:
        """Queue an event; ``wake`` comes after the last one. Thread-safe."""
        self._events.append((request, event))

    def wake(self) -> None:
        """Let the event loop deliver the queued events. Thread-safe."""
        if not self._is_scheduled and not self._loop.is_closed():
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        # Clear the flag first, so that an event that arrives from now on schedules another call.
        self._is_scheduled = False
        while self._events:
            self._deliver(*self._events.popleft())
