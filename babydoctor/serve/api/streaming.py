"""A streamed answer: a worker's engine or a controller's relay writes it, and an HTTP response reads it.

Both sides run at their own speed. Deltas that have not been read are merged into one, so a slow client costs neither
memory nor a request slot. When the response ends for any reason, it closes the answer, which stops the work for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from babydoctor.engine.request import TokenLogprob, Usage
from babydoctor.serve.api.errors import ApiError

HEADERS_WITHIN_S = 4.0
"""A stream's headers are sent after this time even if no work has begun: LLaVA's clients give up after 10 s."""


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """The new part of an answer. The last delta has a ``finish_reason`` or an ``error``.

    In a delta with both, ``text`` arrived before ``error``.
    """

    text: str = ""
    finish_reason: str | None = None
    """``stop`` or ``length``."""
    usage: Usage | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    error: ApiError | None = None
    index: int = 0
    """Index of the answer if a request has several (``n``)."""
    certainty: Mapping[str, Any] = field(default_factory=dict)
    """Results by ``protocol.CERTAINTY_NAMES``, in the last delta of an answer whose request asks for them."""

    def then(self, later: AnswerDelta) -> AnswerDelta:
        """Merge this delta with a later one."""
        return AnswerDelta(
            self.text + later.text,
            later.finish_reason or self.finish_reason,
            later.usage or self.usage,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            later.error or self.error,
            self.index,
            {**self.certainty, **later.certainty},
        )


class EndOfAnswer(Exception):
    """Everything has been read."""


class Readable(Protocol):
    """What a response reads: one answer, or several answers to one request."""

    async def next(self, timeout_s: float) -> AnswerDelta | None:
        """The next delta; None if none arrives in time. Raises ``EndOfAnswer``."""

    async def aclose(self) -> None:
        """Stop the work behind the answer. May be called more than once."""


class AnswerStream:
    """One answer. Call ``put``, ``finish`` and ``fail`` in the event loop's thread.

    An answer never ends with whitespace: trailing whitespace is held back until more text arrives, and dropped if none
    does. Token ids, log probabilities and usage are not held back.

    Args:
        on_close: stops the work. Awaited once, when the reader is done or has disconnected.
    """

    def __init__(self, on_close: Callable[[], Awaitable[None]]) -> None:
        self._on_close = on_close
        self._pending: AnswerDelta | None = None
        self._blanks = ""
        """Whitespace at the end of the text so far."""
        self._ended = False
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._after_close: list[Callable[[], None]] = []

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the answer is closed."""
        self._after_close.append(callback)

    @property
    def ended(self) -> bool:
        return self._ended

    def put(self, delta: AnswerDelta) -> None:
        """Append a delta. Has no effect after the end."""
        if self._ended:
            return
        text = self._blanks + delta.text
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        delta = dataclasses.replace(delta, text=shown)
        self._pending = delta if self._pending is None else self._pending.then(delta)
        self._wake()

    def finish(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End with an error."""
        self.put(AnswerDelta(error=error))
        self.finish()

    async def next(self, timeout_s: float) -> AnswerDelta | None:
        """The next delta; None if none came in time.

        Raises:
            EndOfAnswer: everything has been read.
        """
        if self._pending is None and not self._ended:
            # Not asyncio.wait_for: up to Python 3.11 it loses a cancellation that coincides with a result, and then an
            # answer whose client has disconnected would be generated to the end.
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
            if self._pending is None and not self._ended:
                return None
        delta, self._pending = self._pending, None
        if delta is None:
            raise EndOfAnswer
        return delta

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def aclose(self) -> None:
        """Stop the work behind the answer. May be called more than once."""
        if not self._closed:
            self._closed = True
            self.finish()
            try:
                await self._on_close()
            finally:
                for callback in self._after_close:
                    callback()


class AnswerGroup:
    """Several answers to one request, merged into one stream. Each delta carries the ``index`` of its answer."""

    def __init__(self, answers: Sequence[Readable]) -> None:
        self._answers = answers
        self._reads: dict[asyncio.Future[AnswerDelta | None], int] = {}
        self._left = list(range(len(answers)))
        self._ready: list[AnswerDelta] = []

    async def next(self, timeout_s: float) -> AnswerDelta | None:
        """The next delta of any answer; None if none arrives in time.

        Raises:
            EndOfAnswer: all answers have been read.
        """
        while not self._ready:
            if not self._left:
                raise EndOfAnswer
            for index in set(self._left) - set(self._reads.values()):
                self._reads[asyncio.ensure_future(self._answers[index].next(timeout_s))] = index
            done, _ = await asyncio.wait(self._reads, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return None
            silent = True
            for read in done:
                silent = self._take(read, self._reads.pop(read)) and silent
            if silent and self._left:
                return None
        return self._ready.pop(0)

    def _take(self, read: asyncio.Future[AnswerDelta | None], index: int) -> bool:
        """Record one finished read. True if it returned no delta."""
        try:
            delta = read.result()
        except EndOfAnswer:
            self._left.remove(index)
            return True
        if delta is None:
            return True
        self._ready.append(dataclasses.replace(delta, index=index))
        return False

    async def aclose(self) -> None:
        """Stop the work behind all answers."""
        for read in self._reads:
            read.cancel()
        await asyncio.gather(*self._reads, return_exceptions=True)
        await asyncio.gather(*(answer.aclose() for answer in self._answers))


async def open_all(openings: Sequence[Awaitable[Readable]]) -> Readable:
    """Open the answers to one request. If one is refused, close the others.

    Raises:
        ApiError: an answer was refused.
    """
    if len(openings) == 1:
        return await openings[0]
    tasks = [asyncio.ensure_future(opening) for opening in openings]
    try:
        return AnswerGroup(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, BaseException):
                await result.aclose()
        raise


async def start_opening(opening: Awaitable[Readable]) -> asyncio.Future[Readable]:
    """Open an answer; return early if that takes long, so that the headers of a stream can be sent.

    Raises:
        ApiError: the request was refused.
    """
    task = asyncio.ensure_future(opening)
    await asyncio.wait({task}, timeout=HEADERS_WITHIN_S)
    if task.done():
        task.result()
    return task
