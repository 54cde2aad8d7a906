"""HTTP responses that read an answer and send it as a stream or as one JSON document."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.llava_stream import STREAM_TYPE, frame
from babydoctor.serve.api.streaming import AnswerDelta, EndOfAnswer, Readable
from babydoctor.serve.logs import log
from babydoctor.serve.settings import Limits

logger = logging.getLogger(__name__)


def error_response(error: ApiError, path: str) -> JSONResponse:
    """The HTTP response for an ``ApiError``. OpenAI's clients get 400 for a bad request, other clients 422."""
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    status = 400 if error.status == 422 and path.startswith("/v1/") else error.status
    return JSONResponse(error.body(), status, headers)


class AnswerResponse(Response, ABC):
    """A response that reads an answer and always closes it: at its end, error or deadline, or if the client leaves.

    Args:
        opening: from ``streaming.start_opening``.
    """

    def __init__(self, opening: asyncio.Future[Readable], limits: Limits) -> None:
        super().__init__()
        self._opening = opening
        self._deadline = time.monotonic() + limits.request_timeout_s
        self._tick_s = limits.keep_alive_s

    @abstractmethod
    async def write(self, scope: Scope, send: Send) -> None:
        """Send the whole response."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self.write(scope, send))
        leaving = asyncio.ensure_future(_until_disconnect(receive))
        try:
            # The writer has its own deadline. This one ends responses to clients that do not read.
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

    async def next_delta(self) -> AnswerDelta | None:
        """The next delta; None if none arrives within the keep-alive interval. Errors are returned as deltas.

        Raises:
            EndOfAnswer: everything has been read.
        """
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return AnswerDelta(error=late_error())
        wait_s = min(self._tick_s, left_s)
        if not self._opening.done():
            await asyncio.wait({self._opening}, timeout=wait_s)
            if not self._opening.done():
                return None
        try:
            return await self._opening.result().next(wait_s)
        except ApiError as error:
            return AnswerDelta(error=error)


def late_error() -> ApiError:
    """The error after ``limits.request_timeout_s``."""
    return ApiError("deadline", "The answer took longer than this server allows and was stopped.")


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedAnswer(AnswerResponse):
    """Streams deltas as they arrive.

    Args:
        encode: a delta (None: a keep-alive) -> bytes to send.
        trailer: sent at the end of an answer without error.
    """

    def __init__(
        self,
        opening: asyncio.Future[Readable],
        encode: Callable[[AnswerDelta | None], bytes],
        limits: Limits,
        *,
        media_type: str,
        trailer: bytes = b"",
    ) -> None:
        self.media_type = media_type
        super().__init__(opening, limits)
        # The length is unknown, and nginx must not buffer the stream.
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"
        self.headers["cache-control"] = "no-store"
        self._encode = encode
        self._trailer = trailer

    async def write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while True:
            try:
                delta = await self.next_delta()
            except EndOfAnswer:
                break
            if data := self._encode(delta):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if delta is not None and delta.error is not None:
                break
        await send({"type": "http.response.body", "body": self._trailer, "more_body": False})


class WorkResponse(Response):
    """Work that reports its progress and ends with a reply. The work stops if the client disconnects.

    Args:
        messages: progress, then the reply; it may raise ``ApiError``. It is always closed.
        is_streamed: send every message, each followed by a NUL byte, and a late error as ``{"error": ...}``; otherwise
            send the reply alone, as JSON.
    """

    def __init__(self, messages: AsyncGenerator[dict[str, Any], None], *, is_streamed: bool) -> None:
        super().__init__(media_type=STREAM_TYPE)
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"
        self.headers["cache-control"] = "no-store"
        self._messages = messages
        self._is_streamed = is_streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(scope, receive, send))
        leaving = asyncio.ensure_future(_until_disconnect(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._messages.aclose()
        if not writing.cancelled():
            writing.result()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The first message decides about the status, so a refusal is an HTTP error.
            message = await anext(self._messages)
            if not self._is_streamed:
                message = [message, *[later async for later in self._messages]][-1]
        except ApiError as error:
            return await error_response(error, scope["path"])(scope, receive, send)
        if not self._is_streamed:
            return await JSONResponse(message)(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await send({"type": "http.response.body", "body": frame(message), "more_body": True})
            async for message in self._messages:
                await send({"type": "http.response.body", "body": frame(message), "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": frame(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class CollectedAnswer(AnswerResponse):
    """Sends the whole answer as one JSON document. An error has the HTTP status of its code.

    Args:
        build: one merged delta for each answer -> the document.
    """

    def __init__(
        self,
        opening: asyncio.Future[Readable],
        build: Callable[[list[AnswerDelta]], Any],
        limits: Limits,
        *,
        num_answers: int = 1,
    ) -> None:
        super().__init__(opening, limits)
        self._build = build
        self._answers = [AnswerDelta(index=index) for index in range(num_answers)]

    async def write(self, scope: Scope, send: Send) -> None:
        response = await self._collect(scope["path"])
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": False})

    async def _collect(self, path: str) -> JSONResponse:
        try:
            while True:
                delta = await self.next_delta()
                if delta is None:
                    continue
                if delta.error is not None:
                    return error_response(delta.error, path)
                self._answers[delta.index] = self._answers[delta.index].then(delta)
        except EndOfAnswer:
            return JSONResponse(self._build(self._answers))
