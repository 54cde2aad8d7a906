"""The controller's backend: it keeps the registry of workers and forwards requests to them.

Every call to a worker is asynchronous and has a timeout, so a slow worker does not delay other requests.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
from starlette.requests import Request

from babydoctor.conversation import Template, get_template
from babydoctor.schema import UserError
from babydoctor.serve.api.admission import bearer_key, check_request
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import (
    AttentionRequest,
    CountTokenRequest,
    FleetStatus,
    GenerateRequest,
    ModelRequest,
    RegisterRequest,
    WorkerStatus,
)
from babydoctor.serve.api.streaming import AnswerStream
from babydoctor.serve.controller.calls import WorkerCalls
from babydoctor.serve.controller.fleet import Fleet
from babydoctor.serve.controller.registry import Registry, WorkerRecord, check_worker_url
from babydoctor.serve.controller.relay import Relay
from babydoctor.serve.logs import log
from babydoctor.serve.metrics import ControllerMetrics
from babydoctor.serve.settings import Secrets, ServeSettings, is_loopback

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0


class Controller:
    """The backend behind the controller's routes."""

    def __init__(self, settings: ServeSettings, secrets: Secrets) -> None:
        self.settings = settings
        self.metrics = ControllerMetrics()
        own = settings.controller
        self._secret = secrets.registration
        self._trusted = frozenset(check_worker_url(url) for url in own.trusted_workers)
        self._probes: set[asyncio.Task[None]] = set()
        self._refresh: asyncio.Task[None] | None = None
        self._num_open = 0
        self.draining = False
        timeout = httpx.Timeout(own.worker_silence_s, connect=own.connect_timeout_s)
        # Idle connections expire before uvicorn on the other side closes them (5 s). trust_env=False ignores proxies
        # from the environment: patients' images must go to the worker and nowhere else.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
        self.fleet = Fleet(
            registry=Registry(own.dispatch, own.heart_beat_expiry_s),
            client=httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, follow_redirects=False),
            settings=own,
            metrics=self.metrics,
            headers={"Authorization": f"Bearer {secrets.registration}"} if secrets.registration else {},
            on_failure=self._on_failure,
        )
        self.registry = self.fleet.registry
        self._calls = WorkerCalls(self.fleet, self._probe_soon)
        self.metrics.gauge("workers", "Workers in rotation", lambda: len(self.registry.in_rotation(time.monotonic())))
        self.metrics.gauge("open_requests", "Requests that are open", lambda: self._num_open)
        self.metrics.gauge("queue_length", "Requests of all workers", lambda: self.status().queue_length)

    # The methods of a backend that the common routes call.

    def model_names(self) -> list[str]:
        return self.registry.models(time.monotonic())

    def template(self, model: str) -> Template:
        record = self._calls.worker_for(model)
        name = record.status.template or self.settings.controller.foreign_template
        try:
            return get_template(name)
        except UserError:
            raise ApiError("worker_failed", "The model's template is not known to this controller.") from None

    def unready(self) -> str | None:
        if self.draining:
            return "The controller is shutting down."
        return None if self.model_names() else "No worker is registered, or none can be reached."

    async def open(self, request: GenerateRequest) -> AnswerStream:
        if self.draining:
            raise ApiError("draining", "The server is shutting down.")
        check_request(request, self.settings.limits)
        if request.resume_ids:
            message = "resume_ids is for controllers only; to continue an answer, send `continues`."
            raise ApiError("bad_resume_ids", message, param="resume_ids")
        if self._num_open >= self.settings.limits.max_open:
            raise ApiError("queue_full", "The server is busy. Please try again soon.")
        self._num_open += 1
        try:
            answer = await Relay(self.fleet, request).open()
        except BaseException:
            self._num_open -= 1
            raise
        answer.on_closed(self._closed)
        return answer

    def _closed(self) -> None:
        self._num_open -= 1

    def attention(self, request: AttentionRequest) -> AsyncGenerator[dict[str, Any], None]:
        return self._calls.stream_attention(request)

    async def count_tokens(self, request: CountTokenRequest) -> int:
        return int((await self._calls.ask(request.model, "/count_token", request))["count"])

    async def model_details(self, model: str) -> dict[str, Any]:
        return await self._calls.ask(model, "/model_details", ModelRequest(model=model))

    # Workers.

    def status(self) -> FleetStatus:
        workers = self.registry.in_rotation(time.monotonic())
        return FleetStatus(
            model_names=self.model_names(),
            speed=sum(record.status.speed for record in workers),
            queue_length=sum(max(0, record.status.queue_length + record.unreported) for record in workers),
        )

    def shows_secret(self, request: Request) -> bool:
        """True if the request carries the registration secret."""
        shown = bearer_key(request.scope["headers"])
        return self._secret is not None and hmac.compare_digest(shown.encode(), self._secret.encode())

    def check_registrant(self, request: Request, worker_name: str, *, leaving: bool = False) -> str:
        """Return the worker's URL if the sender may register or unregister it.

        Args:
            leaving: the sender unregisters the worker. LLaVA's own workers never do that.

        Raises:
            ApiError: 403 without the secret, or from another machine if no secret is set; 422 for a bad URL.
        """
        try:
            url = check_worker_url(worker_name)
        except UserError as error:
            raise ApiError("bad_worker_name", f"{error}.", param="worker_name") from None
        if self._secret is None:
            allowed = url in self._trusted or is_from_this_machine(request)
        else:
            record = self.registry.records.get(url)
            # A trusted address needs no secret, unless the worker there has used the secret before.
            is_open = url in self._trusted and not (record is not None and record.knows_secret)
            allowed = self.shows_secret(request) or (is_open and not leaving)
        if not allowed:
            raise ApiError("bad_secret", "Registering a worker needs the registration secret of this controller.")
        return url

    async def register(self, url: str, body: RegisterRequest, *, knows_secret: bool) -> None:
        status = body.worker_status
        if status is None:
            status = await self._fetch_status(url, self.fleet.headers if knows_secret else {})
            if status is None:
                raise ApiError(
                    "worker_unreachable", "The worker does not answer at its worker_name.", param="worker_name"
                )
        record = self.registry.register(url, status, body.check_heart_beat, time.monotonic(), knows_secret=knows_secret)
        self.fleet.seen_models.update(status.model_names)
        log(logger, logging.INFO, "worker registered", worker=record.worker_id, models=status.model_names)

    def heart_beat(self, url: str, queue_length: int, draining: bool | None = None) -> WorkerRecord | None:
        record = self.registry.report(url, queue_length, time.monotonic(), draining=draining)
        # LLaVA's own workers register before they listen, so the first probe waits for the first heartbeat.
        if record is not None and (record.failed or not record.proven):
            self._probe_soon(record)
        return record

    async def refresh(self) -> None:
        """Ask every worker for its status. Workers stay in rotation meanwhile. Concurrent calls share one round."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.ensure_future(self._probe_all())
        await asyncio.shield(self._refresh)

    async def watch(self) -> None:
        """Remove silent workers and probe failed ones, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self.settings.controller.heart_beat_expiry_s / 4))
            for record in self.registry.expire(time.monotonic()):
                log(logger, logging.WARNING, "worker expired", worker=record.worker_id)
            for record in self.registry.records.values():
                if record.failed:
                    self._probe_soon(record)

    async def drain(self) -> None:
        """Accept no new requests, and wait up to ``worker.drain_s`` for the open ones."""
        self.draining = True
        deadline = time.monotonic() + self.settings.worker.drain_s
        while self._num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        for task in self._probes:
            task.cancel()
        await self.fleet.client.aclose()

    def _on_failure(self, record: WorkerRecord) -> None:
        record.failed = True
        self._probe_soon(record)

    def _probe_soon(self, record: WorkerRecord) -> None:
        if any(task.get_name() == record.url for task in self._probes):
            return
        task = asyncio.get_running_loop().create_task(self._probe(record), name=record.url)
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _probe_all(self) -> None:
        records = list(self.registry.records.values())
        await asyncio.gather(*(self._probe(record, is_decisive=True) for record in records))

    async def _probe(self, record: WorkerRecord, *, is_decisive: bool = False) -> None:
        status = await self._fetch_status(record.url, self.fleet.secret_headers(record))
        if self.registry.records.get(record.url) is not record:
            return  # the worker has registered again
        if status is None:
            if not (record.failed or record.doubtful):
                log(logger, logging.WARNING, "worker cannot be reached", worker=record.worker_id)
            record.doubtful = True
            record.failed = record.failed or is_decisive
            return
        if record.failed or not record.proven:
            log(logger, logging.INFO, "worker reached", worker=record.worker_id)
        self.registry.note_status(record, status, time.monotonic())
        self.fleet.seen_models.update(status.model_names)

    async def _fetch_status(self, url: str, headers: dict[str, str]) -> WorkerStatus | None:
        try:
            response = await asyncio.wait_for(
                self.fleet.client.post(f"{url}/worker_get_status", headers=headers), PROBE_TIMEOUT_S
            )
            return WorkerStatus.model_validate_json(response.content) if response.status_code == 200 else None
        except (httpx.HTTPError, TimeoutError, asyncio.TimeoutError, ValueError):
            return None


def is_from_this_machine(request: Request) -> bool:
    """True if the caller is a program on this machine, not a proxy and not a web page in a browser."""
    headers = request.headers
    is_forwarded = any(name in headers for name in ("forwarded", "x-forwarded-for", "x-real-ip", "via", "origin"))
    is_local = request.client is not None and is_loopback(request.client.host)
    return is_local and not is_forwarded and is_loopback(request.url.hostname or "")
