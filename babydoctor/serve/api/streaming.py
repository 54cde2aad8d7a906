"""An answer on its way: filled by a worker's engine or a controller's relay, read by an HTTP response.

The two sides run at their own speed. What the reader has not fetched is merged into one chunk, so a slow client costs
neither memory nor a slot. However the response ends, the answer is closed, and that stops the work behind it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from babydoctor.serve.api.errors import ERROR_NO_WORKER, ERROR_NONE, ERROR_UNREACHABLE, ApiCode, ApiError, known_code
from babydoctor.serve.api.protocol import Chunk
from babydoctor.serve.logs import log

logger = logging.getLogger(__name__)

HEADERS_WITHIN_S = 4.0
"""A stream's headers are sent after this time even where the work has not begun: clients give up after 10 s."""


class EndOfAnswer(Exception):
    """There is nothing more to read."""


class Answer:
    """One answer. ``put``, ``finish`` and ``fail`` are called in the event loop's thread.

    Args:
        on_close: stops the work; awaited once, when the reader is done or has left.
    """

    def __init__(self, on_close: Callable[[], Awaitable[None]]) -> None:
        self._on_close = on_close
        self._pending: Chunk | None = None
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

    def put(self, chunk: Chunk) -> None:
        """Add a chunk; its text is the whole answer so far, without the prompt."""
        if self._ended:
            return
        old = self._pending
        if old is not None:
            ids, logprobs = old.token_ids + chunk.token_ids, old.logprobs + chunk.logprobs
            chunk = Chunk(chunk.text, chunk.error_code, chunk.finish_reason, chunk.usage, ids, logprobs, chunk.code)
        self._pending = chunk
        self._wake()

    def finish(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End with an error."""
        self.put(Chunk.of_error(error))
        self.finish()

    async def next(self, timeout_s: float) -> Chunk | None:
        """The next chunk; None where none came in time.

        Raises:
            EndOfAnswer: all has been read.
        """
        if self._pending is None and not self._ended:
            # Not asyncio.wait_for: up to Python 3.11 it loses a cancellation that comes together with a result, and
            # the client who left would be answered to the end.
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
        chunk, self._pending = self._pending, None
        if chunk is None:
            raise EndOfAnswer
        return chunk

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


async def start_opening(opening: Awaitable[Answer]) -> asyncio.Future[Answer]:
    """Open an answer; come back early where that takes long, so that the headers of a stream can go out.

    Raises:
        ApiError: the request was refused.
    """
    task = asyncio.ensure_future(opening)
    await asyncio.wait({task}, timeout=HEADERS_WITHIN_S)
    if task.done():
        task.result()
    return task


class AnswerResponse(Response, ABC):
    """A response that reads an answer, and closes it whatever happens: end, error, deadline, a client that left.

    Args:
        opening: from ``start_opening``.
        timeout_s: for the whole response.
        tick_s: longest silence.
    """

    def __init__(self, opening: asyncio.Future[Answer], *, timeout_s: float, tick_s: float) -> None:
        super().__init__()
        self._opening = opening
        self._deadline = time.monotonic() + timeout_s
        self._tick_s = tick_s

    @abstractmethod
    async def write(self, send: Send) -> None:
        """Send the whole response."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self.write(send))
        leaving = asyncio.ensure_future(_until_disconnect(receive))
        try:
            # The writer keeps the deadline itself; this one is for a client that does not read.
            spare_s = self._deadline - time.monotonic() + 5
            await asyncio.wait({writing, leaving}, timeout=spare_s, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                log(logger, logging.INFO, "client left" if leaving.done() else "client does not read")
        finally:
            for task in (writing, leaving):
                task.cancel()
            await self._close()
            await asyncio.gather(writing, leaving, return_exceptions=True)
        if not writing.cancelled():
            writing.result()

    async def _close(self) -> None:
        if not self._opening.done():
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if not self._opening.cancelled() and self._opening.exception() is None:
            await self._opening.result().aclose()

    async def next_chunk(self) -> Chunk | None:
        """The next chunk, None for a moment of silence. Errors come as chunks.

        Raises:
            EndOfAnswer: all has been read.
        """
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return Chunk.of_error(
                ApiError("deadline", "The answer took longer than this server allows and was stopped.")
            )
        wait_s = min(self._tick_s, left_s)
        if not self._opening.done():
            await asyncio.wait({self._opening}, timeout=wait_s)
            if not self._opening.done():
                return None
        try:
            return await self._opening.result().next(wait_s)
        except ApiError as error:
            return Chunk.of_error(error)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedAnswer(AnswerResponse):
    """Chunks as they come.

    Args:
        encode: a chunk (None: a moment of silence) -> bytes to send.
        trailer: sent at the end.
    """

    def __init__(
        self,
        opening: asyncio.Future[Answer],
        encode: Callable[[Chunk | None], bytes],
        *,
        media_type: str,
        timeout_s: float,
        tick_s: float,
        trailer: bytes = b"",
    ) -> None:
        self.media_type = media_type
        super().__init__(opening, timeout_s=timeout_s, tick_s=tick_s)
        # The length is not known; nginx must not hold the stream back.
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"
        self.headers["cache-control"] = "no-store"
        self._encode = encode
        self._trailer = trailer

    async def write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while True:
            try:
                chunk = await self.next_chunk()
            except EndOfAnswer:
                break
            if data := self._encode(chunk):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if chunk is not None and chunk.error_code != ERROR_NONE:
                break
        await send({"type": "http.response.body", "body": self._trailer, "more_body": False})


class CollectedAnswer(AnswerResponse):
    """The whole answer as one JSON document.

    Args:
        build: all that was generated, as one chunk -> the document.
    """

    def __init__(
        self,
        opening: asyncio.Future[Answer],
        build: Callable[[Chunk], Any],
        *,
        timeout_s: float,
        tick_s: float,
    ) -> None:
        super().__init__(opening, timeout_s=timeout_s, tick_s=tick_s)
        self._build = build

    async def write(self, send: Send) -> None:
        # Everything is merged by one more Answer, as it would be for a slow client.
        whole = Answer(_nothing)
        try:
            while True:
                chunk = await self.next_chunk()
                if chunk is None:
                    continue
                if chunk.error_code != ERROR_NONE:
                    error = error_of(chunk)
                    return await self._send(send, error.status, error.body())
                whole.put(chunk)
        except EndOfAnswer:
            whole.finish()
        try:
            merged = await whole.next(0)
        except EndOfAnswer:
            merged = Chunk("", finish_reason="stop")
        assert merged is not None
        await self._send(send, 200, self._build(merged))

    async def _send(self, send: Send, status: int, document: Any) -> None:
        response = JSONResponse(document, status)
        await send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": False})


async def _nothing() -> None:
    pass


_CODE_OF_NUMBER: dict[int, ApiCode] = {ERROR_NO_WORKER: "no_worker", ERROR_UNREACHABLE: "worker_lost"}


def error_of(chunk: Chunk) -> ApiError:
    """The error that a chunk carries. The original's workers send a number only."""
    code = known_code(chunk.code, _CODE_OF_NUMBER.get(chunk.error_code, "worker_failed"))
    return ApiError(code, chunk.text)
