"""What goes into the engine and what comes out: requests, events and the handle that joins the two.

A caller builds a ``GenerationRequest``, gives it to ``Engine.submit`` and reads events from the
``GenerationHandle``: any number of ``Delta``, then exactly one ``Finished``. The handle may be read from a thread
(``for event in handle``), from asyncio (``async for event in handle``) or by a callback (``add_listener``).
This module is free of torch, so that servers and tests can import it at no cost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

logger = logging.getLogger(__name__)

GREEDY_TEMPERATURE = 1e-3
"""At or below this temperature the likeliest token is taken (the LLaVA wire's rule)."""

MAX_TOP_LOGPROBS = 20

FinishReason = Literal["stop", "length", "cancelled", "error", "deadline"]


class EngineError(Exception):
    """Why the engine refused or gave up a request. ``code`` is stable, for programs; the text is for people."""

    code = "engine_error"


class InvalidRequestError(EngineError):
    """The request contradicts itself, for example another number of images than image slots."""

    code = "invalid_request"


class PromptTooLongError(EngineError):
    """The prompt leaves no room in the context for an answer."""

    code = "prompt_too_long"


class QueueFullError(EngineError):
    """Too many requests wait already. Try again later."""

    code = "queue_full"


class EngineClosedError(EngineError):
    """The engine is draining or closed and takes no new requests."""

    code = "engine_closed"


class RequestFailedError(EngineError):
    """Something broke while this request was being worked on; other requests go on."""

    code = "request_failed"


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """One image. ``key`` names its content: SHA-256 of the image bytes plus the preprocessing settings.

    ``pixels`` is float32 ``[3, S, S]``, or a function that makes it; the function runs on the engine's thread and
    only when the features are not cached, so give an array unless decoding is cheap.
    """

    key: str
    pixels: np.ndarray | Callable[[], np.ndarray] = field(repr=False)


class Constraint(Protocol):
    """Says which tokens may follow, see ``constraint.JsonConstraint``."""

    @property
    def finished(self) -> bool: ...

    def accept(self, token: int) -> None: ...

    def allowed(self, vocab_size: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One prompt and how to go on from it.

    ``input_ids`` int ``[T]`` and ``image_mask`` bool ``[T]`` come from ``tokens.encode``: every image takes
    ``num_patches`` positions in a row, in the order of ``images``. ``stop`` strings end the answer and are not part
    of it. ``logprobs`` asks for the log probability of each chosen token and of that many likeliest ones (0 to 20;
    None: none). ``timeout_s`` counts from ``submit``. ``seed`` None draws a fresh one.

    ``top_k``, ``min_p``, the penalties and ``logit_bias`` (pairs of token id and bias) mean what they mean in vLLM.
    ``constraint`` says which tokens may follow; it holds state, so it serves one request. The last ``num_resumed``
    ids of ``input_ids`` are answer tokens of an earlier attempt. ``spelled_after`` are the tokens whose text the
    answer continues, so that its first word keeps its space; without them the answer begins as a new text.
    """

    input_ids: np.ndarray
    image_mask: np.ndarray | None = None
    images: tuple[ImageInput, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    timeout_s: float | None = None
    ignore_eos: bool = False
    request_id: str = ""
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = field(default=None, repr=False)
    num_resumed: int = 0
    spelled_after: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_TEMPERATURE


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a token under the model (temperature 1), and of the likeliest ones in its place."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer: whole characters, never part of a stop string.

    ``token_ids`` are the tokens generated since the last event; text that might begin a stop string comes later than
    its tokens. ``logprobs`` is as long as ``token_ids`` when asked for, else empty.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. ``cached_tokens`` of the prompt came from an earlier request's KV memory."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. ``text`` is the whole answer; ``error`` is set when ``finish_reason`` is ``error``.

    ``stop_string`` is the stop string that ended the answer (None: the end-of-text token, or another reason).
    ``queue_s`` is the wait before the first computation, ``first_token_s`` the time from submission to the first token.
    """

    finish_reason: FinishReason
    text: str
    usage: Usage
    error: EngineError | None = None
    stop_string: str | None = None
    queue_s: float = 0.0
    first_token_s: float | None = None
    total_s: float = 0.0


Event = Delta | Finished


class GenerationHandle:
    """The caller's end of a request. All methods may be called from any thread.

    Events are kept until they are read, by one reader: a thread, an asyncio task or a listener.
    """

    def __init__(self, request: GenerationRequest, wake_engine: Callable[[], None] | None = None) -> None:
        self.request = request
        self.submitted_at = time.monotonic()
        self._wake_engine = wake_engine
        self._condition = threading.Condition()
        self._events: deque[Event] = deque()
        self._listener: Callable[[Event], None] | None = None
        self._cancelled = False
        self._finished: Finished | None = None

    def cancel(self) -> None:
        """Ask the engine to stop; it does before its next step and then publishes ``Finished("cancelled")``."""
        self._cancelled = True
        if self._wake_engine is not None:
            self._wake_engine()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to cancel (the engine may not have noticed yet)."""
        return self._cancelled

    @property
    def finished(self) -> Finished | None:
        """The final event once the request has really ended and its memory is free again."""
        return self._finished

    def publish(self, event: Event) -> None:
        """Called by the engine only."""
        with self._condition:
            assert self._finished is None, f"event after the end: {event}"
            if isinstance(event, Finished):
                self._finished = event
            listener = self._listener
            if listener is None:
                self._events.append(event)
            self._condition.notify_all()
        if listener is not None:
            try:
                listener(event)
            except Exception:
                # A reader that breaks must not take the engine down with it.
                logger.exception("the listener of a request failed")

    def add_listener(self, listener: Callable[[Event], None]) -> None:
        """Call ``listener`` with every event, past ones first. It runs on the engine's thread: it must be quick."""
        with self._condition:
            assert self._listener is None, "a handle has one reader"
            # Under the lock, so that the engine cannot publish a newer event in between.
            while self._events:
                listener(self._events.popleft())
            self._listener = listener

    def wait(self, timeout_s: float | None = None) -> Finished | None:
        """Block until the request has ended; None when ``timeout_s`` ran out first."""
        with self._condition:
            self._condition.wait_for(lambda: self._finished is not None, timeout_s)
            return self._finished

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._events))
                event = self._events.popleft()
            yield event
            if isinstance(event, Finished):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def hand_over(event: Event) -> None:
            # A closed loop means that the reader is gone; there is nobody to tell.
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        self.add_listener(hand_over)
        while True:
            event = await queue.get()
            yield event
            if isinstance(event, Finished):
                return

    def result(self, timeout_s: float | None = None) -> Finished:
        """Wait for the end and return it; raise its error if it failed, ``TimeoutError`` if it takes too long."""
        finished = self.wait(timeout_s)
        if finished is None:
            raise TimeoutError(f"request {self.request.request_id!r} did not finish within {timeout_s} s")
        if finished.error is not None:
            raise finished.error
        return finished
