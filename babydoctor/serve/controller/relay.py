"""One request on its way through the controller: from worker to worker until the answer is whole.

A worker that dies in the middle costs the client nothing but a pause. Our own workers send the ids of their tokens,
so another one goes on from exactly the same tokens, and a greedy answer comes out as if nothing had happened. The
original's workers send text only; there the next worker gets prompt and text so far as its prompt.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx

from babydoctor.serve.api.errors import ERROR_NONE, OVERFLOW, ApiError, code_of_status, known_code, overflow_error
from babydoctor.serve.api.protocol import MAX_NEW_TOKENS, Chunk, GenerateRequest, StreamDecoder
from babydoctor.serve.api.routes import ERROR_HEADER
from babydoctor.serve.api.streaming import Answer
from babydoctor.serve.controller.registry import Registry, WorkerRecord
from babydoctor.serve.logs import REQUEST_ID, log
from babydoctor.serve.metrics import ControllerMetrics
from babydoctor.serve.settings import ControllerSettings

logger = logging.getLogger(__name__)

FAILOVER_PATIENCE_S = 20.0
"""How long a broken answer waits for a worker that could go on with it."""


OUR_SILENCE_S = 20.0


class WorkerLost(Exception):
    """The connection to a worker failed."""


@dataclass(slots=True, eq=False)
class Fleet:
    """The workers and the way to them; shared by all requests of a controller."""

    registry: Registry
    client: httpx.AsyncClient
    settings: ControllerSettings
    metrics: ControllerMetrics
    headers: dict[str, str]
    on_failure: Callable[[WorkerRecord], None]
    """Takes a worker out of rotation."""
    seen_models: set[str] = field(default_factory=set)

    def no_worker(self, model: str) -> ApiError:
        """The error for a model that nobody serves now."""
        if model in self.seen_models:
            return ApiError(
                "no_worker",
                "No worker for this model is up at the moment. Please try again soon.",
                param="model",
            )
        return ApiError("model_not_found", "No worker serves that model.", param="model")


def _close_late(sending: asyncio.Future[httpx.Response]) -> None:
    if not sending.cancelled() and sending.exception() is None:
        closing = asyncio.ensure_future(sending.result().aclose())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())


class Relay:
    """The state of one answer."""

    def __init__(self, fleet: Fleet, request: GenerateRequest) -> None:
        self._fleet = fleet
        self._request = request
        self._answer = Answer(self._close)
        self._reader: asyncio.Task[None] | None = None
        self._text = ""
        self._token_ids: tuple[int, ...] = ()
        self._num_chunks = 0
        self._tried: list[WorkerRecord] = []

    async def open(self) -> Answer:
        """Find a worker that takes the request.

        Raises:
            ApiError: none does.
        """
        record, response = await self._connect()
        self._reader = asyncio.ensure_future(self._read_to_the_end(record, response))
        return self._answer

    async def _close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _connect(self) -> tuple[WorkerRecord, httpx.Response]:
        """Offer the request to one worker after the other, each once. The caller ends the record's request."""
        fleet, busy, lost = self._fleet, None, False
        while True:
            record = fleet.registry.pick(self._request.model, time.monotonic(), self._tried)
            if record is None:
                if busy is not None:
                    raise busy
                if lost:
                    raise ApiError(
                        "worker_lost",
                        "The worker for this model cannot be reached. Please try again soon.",
                    )
                raise fleet.no_worker(self._request.model)
            self._tried.append(record)
            try:
                return record, await self._post(record)
            except WorkerLost:
                lost = True
            except ApiError as error:
                # 429 and 5xx are about that worker, everything else is about the request.
                if error.status != 429 and error.status < 500:
                    raise
                busy = busy or error

    async def _post(self, record: WorkerRecord) -> httpx.Response:
        """Send the request to a worker; returns once its headers are there."""
        fleet = self._fleet
        fleet.registry.begin(record)
        try:
            for is_last in (False, True):
                request = fleet.client.build_request(
                    "POST",
                    f"{record.url}/worker_generate_stream",
                    content=json.dumps(self._body_for(record)).encode(),
                    headers=fleet.headers
                    | {"Content-Type": "application/json", "X-Request-Id": REQUEST_ID.get() or ""},
                )
                try:
                    response = await self._send(request, self._silence_s(record))
                    break
                except (httpx.ConnectError, httpx.TimeoutException, TimeoutError, asyncio.TimeoutError) as error:
                    self._lose(record, error)
                except (httpx.TransportError, OSError) as error:
                    # A connection kept alive may be closed just as it is used again; that says nothing yet.
                    if is_last:
                        self._lose(record, error)
            await self._check_head(response)
            return response
        except BaseException:
            fleet.registry.end(record)
            raise

    async def _send(self, request: httpx.Request, timeout_s: float) -> httpx.Response:
        """Send and wait for the headers; a response that comes after the caller has gone is closed.

        Not asyncio.wait_for: a cancellation that meets the response would lose it, open, or be lost itself.
        """
        sending = asyncio.ensure_future(self._fleet.client.send(request, stream=True))
        try:
            await asyncio.wait({sending}, timeout=timeout_s)
        except asyncio.CancelledError:
            sending.cancel()
            sending.add_done_callback(_close_late)
            raise
        if not sending.done():
            sending.cancel()
            sending.add_done_callback(_close_late)
            raise TimeoutError
        return sending.result()

    def _silence_s(self, record: WorkerRecord) -> float:
        """How long a worker may be silent. Ours sends headers at once and a sign of life every few seconds."""
        silence_s = self._fleet.settings.worker_silence_s
        return min(silence_s, OUR_SILENCE_S) if record.status.template is not None else silence_s

    def _lose(self, record: WorkerRecord, error: Exception) -> None:
        self._fleet.metrics.failed_connections.inc()
        self._fleet.on_failure(record)
        log(logger, logging.WARNING, "worker lost", worker=record.worker_id, reason=type(error).__name__)
        raise WorkerLost from error

    async def _check_head(self, response: httpx.Response) -> None:
        """Turn a refusal into an ``ApiError``."""
        if response.status_code == 200 and ERROR_HEADER not in response.headers:
            return
        try:
            await asyncio.wait_for(response.aread(), 5)
            data = json.loads(response.content.split(b"\0")[0])
        except (ValueError, httpx.TransportError, TimeoutError, asyncio.TimeoutError):
            data = {}
        finally:
            await response.aclose()
        data = data if isinstance(data, dict) else {}
        error = data["error"] if isinstance(data.get("error"), dict) else {}
        status = response.status_code
        code = known_code(response.headers.get(ERROR_HEADER) or error.get("code"), code_of_status(status))
        if code == OVERFLOW:
            raise overflow_error()
        if status in (401, 403):
            # This is between controller and worker; to the client it is a broken server.
            log(logger, logging.ERROR, "worker refuses the controller's secret")
            message = "The worker refuses this controller: both need the same registration secret."
            raise ApiError("worker_refused", message)
        message = str(error.get("message") or data.get("text") or "The worker failed at this request.")
        retry_after = response.headers.get("retry-after", "")
        raise ApiError(
            code,
            message,
            param=error.get("param"),
            retry_after_s=int(retry_after) if retry_after.isdecimal() else None,
        )

    def _body_for(self, record: WorkerRecord) -> dict[str, object]:
        """The request for this worker, going on after what came already."""
        body = self._request.model_dump(exclude_none=True)
        body |= {"echo": True, "token_ids": True}
        stops = self._request.stops
        body["stop"] = stops[0] if len(stops) == 1 else list(stops)
        if record.status.template is not None:
            if self._token_ids:
                body["resume_ids"] = list(self._token_ids)
            return body
        # The original's workers take one string and no more than they know of.
        body["stop"] = stops[-1] if stops else ""
        body["prompt"] = self._request.prompt + self._text
        spent = len(self._token_ids) or self._num_chunks
        body["max_new_tokens"] = max(1, min(self._request.max_new_tokens, MAX_NEW_TOKENS) - spent)
        return body

    async def _read_to_the_end(self, record: WorkerRecord, response: httpx.Response) -> None:
        """Read the answer, from other workers where one is lost."""
        while True:
            try:
                await self._read(record, response)
                return
            except (WorkerLost, ValueError) as error:
                log(logger, logging.WARNING, "stream broke", worker=record.worker_id, reason=type(error).__name__)
            except ApiError as error:
                self._answer.fail(error)
                return
            except Exception:
                logger.exception("relay failed")
                self._answer.fail(ApiError("internal", "The server failed at this request."))
                return
            finally:
                self._fleet.registry.end(record)
                # Shielded: the client may leave at this very moment, and the connection has to be closed all the same.
                await asyncio.shield(response.aclose())
            try:
                record, response = await self._reconnect()
            except ApiError as error:
                self._answer.fail(error)
                return
            self._fleet.metrics.failovers.inc()
            log(logger, logging.WARNING, "answer continued", worker=record.worker_id, tokens=len(self._token_ids))

    async def _reconnect(self) -> tuple[WorkerRecord, httpx.Response]:
        """Find a worker to go on, with some patience: others may be busy, or the lost one may be starting anew."""
        deadline = time.monotonic() + FAILOVER_PATIENCE_S
        while True:
            try:
                return await self._connect()
            except ApiError as error:
                if time.monotonic() > deadline or error.status not in (404, 429, 503):
                    raise ApiError(
                        "worker_lost",
                        "The worker was lost in the middle of the answer, and no other could go on. Please ask again.",
                    ) from error
            await asyncio.sleep(0.25)
            self._tried = [record for record in self._tried if record.failed]

    async def _read(self, record: WorkerRecord, response: httpx.Response) -> None:
        """Read one worker's stream to its end.

        Raises:
            WorkerLost: it broke off.
        """
        decoder = StreamDecoder()
        is_ours = record.status.template is not None
        prompt = self._request.prompt
        try:
            async for data in self._bytes(record, response):
                for chunk in decoder.feed(data):
                    if chunk.error_code != ERROR_NONE:
                        if chunk.code == "draining":
                            raise WorkerLost
                        self._answer.put(chunk)
                        return self._answer.finish()
                    self._pass_on(chunk.with_text(chunk.text.removeprefix(prompt)))
                    if chunk.finish_reason is not None:
                        return self._answer.finish()
        except (httpx.TransportError, httpx.StreamError, OSError) as error:
            self._lose(record, error)
        if decoder.pending or is_ours:
            # Ours always says why it stopped.
            raise WorkerLost
        self._answer.put(Chunk(self._text, finish_reason="stop"))
        self._answer.finish()

    def _pass_on(self, chunk: Chunk) -> None:
        is_last = chunk.finish_reason is not None
        if len(chunk.text) < len(self._text) and not is_last:
            # The next worker begins where the lost one began; the client has that already.
            chunk = chunk.with_text(self._text)
        elif chunk.text == self._text and not (chunk.token_ids or chunk.logprobs or is_last):
            return
        self._text = chunk.text
        self._token_ids += chunk.token_ids
        self._num_chunks += 1
        self._answer.put(chunk)

    async def _bytes(self, record: WorkerRecord, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body as it comes. A worker that is silent for too long, or out of rotation and silent, is lost."""
        stream = response.aiter_raw().__aiter__()
        silent_since = time.monotonic()
        pending: asyncio.Future[bytes] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(stream))
                await asyncio.wait({pending}, timeout=1)
                if pending.done():
                    finished, pending = pending, None
                    try:
                        data = finished.result()
                    except StopAsyncIteration:
                        return
                    silent_since = time.monotonic()
                    yield data
                    continue
                silent_s = time.monotonic() - silent_since
                self._fleet.registry.expire(time.monotonic())
                gone = not self._fleet.registry.is_current(record)
                if silent_s > self._silence_s(record) or (gone and silent_s > 5):
                    self._lose(record, TimeoutError())
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
