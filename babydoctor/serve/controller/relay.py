"""Relay one request: send it to a worker, and to further workers if one is lost, until the answer is complete.

If a worker dies in the middle of an answer, the client only sees a pause. BabyDoctor workers send the ids of their
tokens, so the next worker continues from exactly the same tokens, and a greedy answer is the same as without the
failure. LLaVA's own workers send text only, so the next worker gets the prompt and the text so far as its prompt.

A request that kills its worker must not kill the next one. It is refused if it was the only request without a token on
the lost worker, if two workers were lost while it had no token, or if ``MAX_LOSSES`` workers were lost with it.
"""

from __future__ import annotations

import asyncio
import logging
import time

import httpx

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import MAX_NEW_TOKENS, GenerateRequest
from babydoctor.serve.api.streaming import AnswerDelta, AnswerStream, EndOfAnswer
from babydoctor.serve.client import LlavaStream
from babydoctor.serve.controller.fleet import Fleet, WorkerLost
from babydoctor.serve.controller.registry import WorkerRecord
from babydoctor.serve.logs import log

logger = logging.getLogger(__name__)

MAX_LOSSES = 4
"""Number of lost workers after which an answer fails, even if each of them had sent tokens of it."""

FAILOVER_TIMEOUT_S = 20.0
"""How long an interrupted answer waits for a worker that can continue it."""


class WorkerHandsOver(Exception):
    """A worker shuts down, so another worker must continue its answer."""


class Relay:
    """The state of one answer."""

    def __init__(self, fleet: Fleet, request: GenerateRequest) -> None:
        self._fleet = fleet
        self._request = request
        self._answer = AnswerStream(self._close)
        self._reader: asyncio.Task[None] | None = None
        self._text = ""
        self._token_ids: tuple[int, ...] = ()
        self._num_deltas = 0
        self._tried: list[WorkerRecord] = []
        self._num_losses = 0
        self._num_early_losses = 0

    async def open(self) -> AnswerStream:
        """Find a worker that accepts the request.

        Raises:
            ApiError: no worker accepts it.
        """
        record, response = await self._connect()
        self._reader = asyncio.ensure_future(self._read_to_the_end(record, response))
        return self._answer

    async def _close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _connect(self) -> tuple[WorkerRecord, httpx.Response]:
        """Send the request to one worker after another, once each. The caller must call ``Registry.end``."""
        fleet, busy, lost = self._fleet, None, False
        while True:
            record = fleet.registry.pick(self._request.model, time.monotonic(), self._tried)
            if record is None:
                if busy is not None:
                    raise busy
                if lost:
                    message = "The worker for this model cannot be reached. Please try again soon."
                    raise ApiError("worker_lost", message)
                raise fleet.no_worker(self._request.model)
            self._tried.append(record)
            try:
                return record, await self._start(record)
            except WorkerLost as error:
                self._record_loss(record, error)
                lost = True
            except ApiError as error:
                # 429 and 5xx concern this worker only; any other status concerns the request.
                if error.status != 429 and error.status < 500:
                    raise
                # Of several refusals, prefer "busy": the client can wait for that.
                busy = error if busy is None or error.code == "queue_full" else busy

    async def _start(self, record: WorkerRecord) -> httpx.Response:
        """Send the request to a worker. On success the caller must call ``Registry.end``."""
        registry = self._fleet.registry
        registry.begin(record)
        record.without_token.add(self)
        try:
            return await self._fleet.start_stream(record, self._body_for(record))
        except BaseException:
            record.without_token.discard(self)
            registry.end(record)
            raise

    def _record_loss(self, record: WorkerRecord, lost: WorkerLost) -> None:
        """Record that a worker was lost while it had this request.

        Raises:
            ApiError: the request probably caused the loss.
        """
        record.note_loss()
        if not lost.was_sent or record.suspects is None:
            return
        is_suspect = self in record.suspects
        self._num_losses += 1
        self._num_early_losses += is_suspect
        is_alone = is_suspect and len(record.suspects) == 1
        if is_alone or self._num_early_losses > 1 or self._num_losses >= MAX_LOSSES:
            log(logger, logging.ERROR, "request not offered again", worker=record.worker_id, losses=self._num_losses)
            self._fleet.metrics.quarantined.inc()
            message = "The worker was lost while it read this request, so the request is not given to another one."
            raise ApiError("worker_lost", message)

    def _body_for(self, record: WorkerRecord) -> dict[str, object]:
        """The request for this worker. It continues after the text and tokens that have already arrived."""
        body = self._request.model_dump(exclude_none=True)
        body |= {"echo": True, "token_ids": True}
        stops = self._request.stops
        body["stop"] = stops[0] if len(stops) == 1 else list(stops)
        if record.status.template is not None:
            if self._token_ids:
                body["resume_ids"] = list(self._token_ids)
            return body
        # LLaVA's own workers accept one stop string.
        body["stop"] = stops[-1] if stops else ""
        body["prompt"] = self._request.prompt + self._text
        spent = len(self._token_ids) or self._num_deltas
        body["max_new_tokens"] = max(1, min(self._request.max_new_tokens, MAX_NEW_TOKENS) - spent)
        return body

    async def _read_to_the_end(self, record: WorkerRecord, response: httpx.Response) -> None:
        """Read the answer. If a worker is lost, continue with another one."""
        while True:
            try:
                await self._read(record, response)
                return
            except WorkerHandsOver:
                log(logger, logging.INFO, "worker hands over", worker=record.worker_id)
            except (WorkerLost, ValueError) as error:
                log(logger, logging.WARNING, "stream broke", worker=record.worker_id, reason=type(error).__name__)
                if isinstance(error, WorkerLost):
                    try:
                        self._record_loss(record, error)
                    except ApiError as refusal:
                        self._answer.fail(refusal)
                        return
            except ApiError as error:
                self._answer.fail(error)
                return
            except Exception:
                logger.exception("relay failed")
                self._answer.fail(ApiError("internal", "The server failed at this request."))
                return
            finally:
                record.without_token.discard(self)
                self._fleet.registry.end(record)
                # Shielded, so that the connection is closed even if the client disconnects right now.
                await asyncio.shield(response.aclose())
            try:
                record, response = await self._reconnect()
            except ApiError as error:
                self._answer.fail(error)
                return
            self._fleet.metrics.failovers.inc()
            log(logger, logging.WARNING, "answer continued", worker=record.worker_id, tokens=len(self._token_ids))

    async def _reconnect(self) -> tuple[WorkerRecord, httpx.Response]:
        """Find a worker to continue. Retry for a while: others may be busy, or the lost one may be restarting."""
        deadline = time.monotonic() + FAILOVER_TIMEOUT_S
        while True:
            try:
                return await self._connect()
            except ApiError as error:
                is_late = time.monotonic() > deadline
                if is_late and error.code == "queue_full":
                    raise
                if is_late or error.status not in (404, 429, 503):
                    message = "The worker was lost in the middle of the answer, and no other could continue it."
                    raise ApiError("worker_lost", f"{message} Please ask again.") from error
            await asyncio.sleep(0.25)
            self._tried = [record for record in self._tried if record.failed]

    async def _read(self, record: WorkerRecord, response: httpx.Response) -> None:
        """Read one worker's stream to its end.

        Raises:
            WorkerLost: the stream broke off.
            ValueError: the worker sent something that is not a stream.
        """
        stream = LlavaStream(response, front=self._request.prompt, so_far=self._text)
        try:
            while (delta := await self._next(record, stream)) is not None:
                if delta.error is not None:
                    if delta.error.code == "draining":
                        raise WorkerHandsOver
                    if delta.error.code == "not_ready":  # stuck, possibly because of this request
                        self._fleet.lose(record, TimeoutError())
                    return self._answer.fail(delta.error)
                self._pass_on(delta, record)
                if delta.finish_reason is not None:
                    return self._answer.finish()
        except (httpx.TransportError, httpx.StreamError, OSError) as error:
            self._fleet.lose(record, error)
        finally:
            self._text = stream.so_far
            await stream.aclose()
        if stream.is_cut or record.status.template is not None:
            # BabyDoctor workers always send a finish reason, so without one the stream is incomplete.
            raise WorkerLost
        self._answer.put(AnswerDelta(finish_reason="stop"))
        self._answer.finish()

    def _pass_on(self, delta: AnswerDelta, record: WorkerRecord) -> None:
        is_keep_alive = not (delta.text or delta.token_ids or delta.logprobs or delta.finish_reason)
        if is_keep_alive:
            return
        record.without_token.discard(self)
        self._token_ids += delta.token_ids
        self._num_deltas += 1
        self._answer.put(delta)

    async def _next(self, record: WorkerRecord, stream: LlavaStream) -> AnswerDelta | None:
        """The next delta; None at the end. A worker that is silent for too long is lost, sooner if out of rotation."""
        silent_since = time.monotonic()
        while True:
            try:
                delta = await stream.next(1)
            except EndOfAnswer:
                return None
            if delta is not None:
                return delta
            silent_s = time.monotonic() - silent_since
            self._fleet.registry.expire(time.monotonic())
            gone = not self._fleet.registry.is_current(record)
            if silent_s > self._fleet.silence_s(record) or (gone and silent_s > 5):
                self._fleet.lose(record, TimeoutError())
