"""Requests to the engine, its events, and the handle that connects them.

A caller builds a ``GenerationRequest``, gives it to ``Engine.submit`` and reads events from the
``GenerationHandle``: any number of ``Delta``, then exactly one ``Finished``. Read it from a thread
(``for event in handle``) or with a callback (``add_listener``). This module does not import torch, so servers and tests
import it quickly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

logger = logging.getLogger(__name__)

GREEDY_TEMPERATURE = 1e-3
"""At or below this temperature decoding is greedy, as in the LLaVA wire protocol."""

MAX_TOP_LOGPROBS = 20

FinishReason = Literal["stop", "length", "cancelled", "error", "deadline"]


class EngineError(Exception):
    """The engine refused or ended a request. Programs read ``code``, which is stable; people read the text."""

    code = "engine_error"


class InvalidRequestError(EngineError):
    """The request is inconsistent, for example its number of images differs from its image slots."""

    code = "invalid_request"


class PromptTooLongError(EngineError):
    """The prompt leaves no room for an answer in the context."""

    code = "prompt_too_long"


class QueueFullError(EngineError):
    """The queue is full. Try again later."""

    code = "queue_full"


class EngineClosedError(EngineError):
    """The engine is draining or closed and takes no new requests."""

    code = "engine_closed"


class RequestFailedError(EngineError):
    """The computation of this request failed. Other requests are unaffected."""

    code = "request_failed"


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """One image. ``key`` identifies its content: SHA-256 of the image bytes plus the preprocessing settings.

    ``pixels`` is float32 ``[3, S, S]``, or a function that returns it. The function runs on the engine's thread, and
    only when the features are not cached; pass an array unless decoding is cheap.
    """

    key: str
    pixels: np.ndarray | Callable[[], np.ndarray] = field(repr=False)


class Constraint(Protocol):
    """Restricts the next token; see ``constraint.JsonConstraint``."""

    @property
    def finished(self) -> bool: ...

    def accept(self, token: int) -> None: ...

    def allowed(self, vocab_size: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One prompt and how to continue it.

    ``input_ids`` int ``[T]`` and ``image_mask`` bool ``[T]`` come from ``tokens.encode``: each image takes
    ``num_patches`` consecutive positions, in the order of ``images``. ``stop`` strings end the answer and are not part
    of it. ``logprobs`` requests the log probability of each chosen token and of that many likeliest tokens (0 to 20;
    None: none). ``timeout_s`` counts from ``submit``. ``seed`` None draws a new one.

    ``top_k``, ``min_p``, the penalties and ``logit_bias`` (pairs of token id and bias) work as in vLLM.
    ``constraint`` restricts the next token; it holds state, so it serves one request. The last ``num_resumed`` ids of
    ``input_ids`` are answer tokens of an earlier attempt. ``spelled_after`` are the tokens whose text the answer
    continues, so that its first word keeps its leading space; without them the answer starts a new text.
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
    """Log probability of a token at temperature 1, and the likeliest alternatives at its position."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer: whole characters, never part of a stop string.

    ``token_ids`` are the tokens generated since the last event. Text that could start a stop string is held back and
    follows in a later event than its tokens. ``logprobs`` is as long as ``token_ids`` if requested, else empty.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. ``cached_tokens`` of the prompt came from the KV cache of an earlier request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. ``text`` is the whole answer; ``error`` is set if ``finish_reason`` is ``error``.

    ``stop_string`` is the stop string that ended the answer (None: the end-of-text token, or another reason).
    ``queue_s`` is the wait before the first computation, ``first_token_s`` the time from submission to first token.
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
    """The caller's side of a request. All methods are thread-safe.

    Events wait in a queue for the single reader, which is a thread or a listener.
    """

    def __init__(self, request: GenerationRequest, wake_engine: Callable[[], None] | None = None) -> None:
        self.request = request
        self.submitted_at = time.monotonic()
        self._wake_engine = wake_engine
        self._condition = threading.Condition()
        self._ended = threading.Event()  # not the condition, which each token would wake
        self._events: deque[Event] = deque()
        self._listener: Callable[[Event], None] | None = None
        self._after_step: Callable[[], None] | None = None
        self._cancelled = False
        self._finished: Finished | None = None

    def cancel(self) -> None:
        """Request cancellation. Before its next step the engine publishes ``Finished("cancelled")``."""
        self._cancelled = True
        if self._wake_engine is not None:
            self._wake_engine()

    @property
    def cancelled(self) -> bool:
        """True once cancellation was requested, even if the engine has not reacted yet."""
        return self._cancelled

    @property
    def finished(self) -> Finished | None:
        """The last event, once the request has ended and its slot is free."""
        return self._finished

    def publish(self, event: Event) -> Callable[[], None] | None:
        """Append an event. Only the engine calls this.

        Returns:
            What to call once after all events of this step, whichever requests they belong to.
        """
        with self._condition:
            assert self._finished is None, f"event after the end: {event}"
            if isinstance(event, Finished):
                self._finished = event
            listener = self._listener
            if listener is None:
                self._events.append(event)
            self._condition.notify_all()
        if isinstance(event, Finished):
            self._ended.set()
        if listener is not None:
            try:
                listener(event)
            except Exception:
                # An error in a listener must not stop the engine.
                logger.exception("the listener of a request failed")
        return self._after_step

    def add_listener(self, listener: Callable[[Event], None], after_step: Callable[[], None] | None = None) -> None:
        """Call ``listener`` with every event, past ones first. It runs on the engine's thread, so it must be fast.

        Args:
            after_step: called after the listeners of a step. If several requests have the same one, it is called once
                for all of them, so it is the place to wake up another thread.
        """
        with self._condition:
            assert self._listener is None, "a handle has one reader"
            # With the lock held, the engine cannot publish a newer event in between.
            while self._events:
                listener(self._events.popleft())
            self._listener, self._after_step = listener, after_step
        if after_step is not None:
            after_step()  # for the past events

    def wait(self, timeout_s: float | None = None) -> Finished | None:
        """Block until the request has ended. Returns None after ``timeout_s``."""
        self._ended.wait(timeout_s)
        return self._finished

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._events))
                event = self._events.popleft()
            yield event
            if isinstance(event, Finished):
                return

    def result(self, timeout_s: float | None = None) -> Finished:
        """Wait for the last event. Raises the error of a failed request; ``TimeoutError`` after ``timeout_s``."""
        finished = self.wait(timeout_s)
        if finished is None:
            raise TimeoutError(f"request {self.request.request_id!r} did not finish within {timeout_s} s")
        if finished.error is not None:
            raise finished.error
        return finished
