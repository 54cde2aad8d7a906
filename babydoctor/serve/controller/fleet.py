"""The workers of a controller and the connections to them, shared by all requests."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from babydoctor.serve.api.errors import ApiError, model_not_found
from babydoctor.serve.client import GENERATE_PATH, is_refusal, refusal_of
from babydoctor.serve.controller.registry import Registry, WorkerRecord
from babydoctor.serve.logs import REQUEST_ID, log
from babydoctor.serve.metrics import ControllerMetrics
from babydoctor.serve.settings import ControllerSettings

logger = logging.getLogger(__name__)

OUR_SILENCE_S = 20.0
"""Longest silence of a BabyDoctor worker. It sends headers at once and a keep-alive every few seconds."""


class WorkerLost(Exception):
    """The connection to a worker failed.

    Args:
        was_sent: the worker had received the request, so the request may have caused the failure.
    """

    def __init__(self, *, was_sent: bool = True) -> None:
        super().__init__()
        self.was_sent = was_sent


@dataclass(slots=True, eq=False)
class Fleet:
    """Calls the registered workers."""

    registry: Registry
    client: httpx.AsyncClient
    settings: ControllerSettings
    metrics: ControllerMetrics
    headers: dict[str, str]
    """Hold the registration secret. Sent only to workers that registered with it."""
    on_failure: Callable[[WorkerRecord], None]
    """Called with a lost worker, to take it out of rotation."""
    seen_models: set[str] = field(default_factory=set)
    started_s: float = field(default_factory=time.monotonic)

    def no_worker(self, model: str) -> ApiError:
        """The error for a model that no worker serves now."""
        if model in self.seen_models:
            message = "No worker for this model is up at the moment. Please try again soon."
            return ApiError("no_worker", message, param="model")
        if time.monotonic() - self.started_s < self.settings.heart_beat_expiry_s and not self.registry.records:
            # After a restart, workers return with their next heartbeat, so the model may exist.
            message = "This controller has just started and no worker has registered yet. Please try again soon."
            return ApiError("no_worker", message, param="model")
        return model_not_found(model, self.registry.models(time.monotonic()))

    def silence_s(self, record: WorkerRecord) -> float:
        """Seconds of silence after which a worker counts as lost."""
        silence_s = self.settings.worker_silence_s
        return min(silence_s, OUR_SILENCE_S) if record.status.template is not None else silence_s

    def secret_headers(self, record: WorkerRecord) -> dict[str, str]:
        return self.headers if record.knows_secret else {}

    def call_headers(self, record: WorkerRecord) -> dict[str, str]:
        own = {"Content-Type": "application/json", "X-Request-Id": REQUEST_ID.get() or ""}
        return self.secret_headers(record) | own

    async def start_stream(self, record: WorkerRecord, body: dict[str, object]) -> httpx.Response:
        """Send a request to a worker and return its response once the headers have arrived.

        Raises:
            WorkerLost: the worker cannot be reached.
            ApiError: the worker refuses the request.
        """
        content = json.dumps(body).encode()
        was_sent = False
        for is_last in (False, True):
            request = self.client.build_request(
                "POST", record.url + GENERATE_PATH, content=content, headers=self.call_headers(record)
            )
            try:
                response = await self._send(request, self.silence_s(record))
                break
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                self.lose(record, error, was_sent=was_sent)
            except (httpx.TimeoutException, TimeoutError, asyncio.TimeoutError) as error:
                self.lose(record, error)
            except (httpx.TransportError, OSError) as error:
                # The worker may have closed an idle connection just as it was reused, so try once more.
                was_sent = True
                if is_last:
                    self.lose(record, error)
        await _check_refusal(response)
        return response

    def lose(self, record: WorkerRecord, error: Exception, *, was_sent: bool = True) -> None:
        """Take a worker out of rotation and record which requests may have caused its loss.

        Raises:
            WorkerLost: always.
        """
        self.metrics.failed_connections.inc()
        record.note_loss()
        self.on_failure(record)
        log(logger, logging.WARNING, "worker lost", worker=record.worker_id, reason=type(error).__name__)
        raise WorkerLost(was_sent=was_sent) from error

    async def _send(self, request: httpx.Request, timeout_s: float) -> httpx.Response:
        """Send a request and wait for the headers. A response that arrives after a timeout or cancellation is closed.

        Not asyncio.wait_for: if cancellation and response coincide, it leaves the response open or loses the
        cancellation.
        """
        sending = asyncio.ensure_future(self.client.send(request, stream=True))
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


def _close_late(sending: asyncio.Future[httpx.Response]) -> None:
    if not sending.cancelled() and sending.exception() is None:
        closing = asyncio.ensure_future(sending.result().aclose())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _check_refusal(response: httpx.Response) -> None:
    """Raise a worker's refusal as an ``ApiError``."""
    if not is_refusal(response):
        return
    try:
        await asyncio.wait_for(response.aread(), 5)
        error = refusal_of(response)
    except (httpx.TransportError, TimeoutError, asyncio.TimeoutError):
        error = ApiError("worker_failed", "The worker failed at this request.")
    finally:
        await response.aclose()
    if response.status_code in (401, 403):
        # The client cannot fix this, so it gets a server error instead of 401 or 403.
        log(logger, logging.ERROR, "worker refuses the controller's secret")
        message = "The worker refuses this controller: both need the same registration secret."
        error = ApiError("worker_refused", message)
    raise error
