"""A worker: one model behind an HTTP server.

``protocol.parse -> admission -> tokens.encode -> image -> engine -> stream``. The engine's thread owns the model; here
everything is asynchronous, and decoding images and tokenising happen in a few threads beside the event loop. A place
is given back when the engine has really ended a request, however the client behaves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from babydoctor import __version__
from babydoctor.engine.request import Delta, EngineError, Event, Finished, FinishReason
from babydoctor.engine.request import Usage as EngineUsage
from babydoctor.schema import UserError
from babydoctor.serve.api.admission import Keys, check_image_count, check_request
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.middleware import Gate, add_error_handlers
from babydoctor.serve.api.protocol import (
    AttentionRequest,
    Chunk,
    CountTokenRequest,
    GenerateRequest,
    TokenLogprob,
    WorkerStatus,
)
from babydoctor.serve.api.routes import BODY_ERRORS, OPEN_PATHS, add_common_routes, errors
from babydoctor.serve.api.streaming import Answer
from babydoctor.serve.logs import REQUEST_ID, log
from babydoctor.serve.settings import Secrets, ServeSettings
from babydoctor.serve.worker.backend import SingleModelBackend
from babydoctor.serve.worker.jobs import EventPump, Job
from babydoctor.serve.worker.preprocess import Preparer, api_error
from babydoctor.serve.worker.registration import Registration
from babydoctor.serve.worker.retention import Retention

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine
    from babydoctor.model.run_dir import Run

logger = logging.getLogger(__name__)


class Worker(SingleModelBackend):
    """The backend behind the worker's routes.

    Args:
        run: the loaded run directory.
        engine: started, over the run's model.
    """

    def __init__(self, run: Run, engine: Engine, settings: ServeSettings, name: str) -> None:
        super().__init__(settings, name, run.manifest.template, engine.memory.max_running)
        self.run = run
        self.engine = engine
        self.jobs: set[Job] = set()
        self._preparer = Preparer(run, engine, settings.limits)
        self._threads = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), thread_name_prefix="prepare")
        # Waits for the engine, so it has a thread of its own: preparing the next requests must not wait with it.
        self._lookers = ThreadPoolExecutor(1, thread_name_prefix="attention")
        self._pump: EventPump | None = None
        retention_dir = settings.worker.retention_dir
        self._retention = Retention(retention_dir) if retention_dir else None
        self._add_gauges()

    # What the common routes ask of a backend.

    def unready(self) -> str | None:
        if self.draining:
            return "The worker is shutting down."
        return None if self.engine.healthy else "The engine has stopped; the worker has to be started anew."

    async def open(self, request: GenerateRequest) -> Answer:
        self._check_model(request.model)
        self._check_not_draining()
        check_request(request, self.settings.limits)
        self.places.take()
        received_s = time.monotonic()
        preparing = asyncio.ensure_future(self._in_thread(self._prepare, request, received_s))
        try:
            job: Job = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # A thread cannot be cancelled; what it may yet give to the engine is taken back.
            preparing.add_done_callback(lambda done: self._abandon(done, received_s))
            raise
        except BaseException:
            self.places.give_back(time.monotonic() - received_s)
            raise
        return job.answer

    async def attention(self, request: AttentionRequest) -> dict[str, Any]:
        self._check_model(request.model)
        check_image_count(request.prompt, request.images, self.settings.limits)
        if len(request.images) != 1:
            raise ApiError("wrong_image_count", "There must be one image to look at.", param="images")
        if len(request.prompt) > self.settings.limits.max_prompt_chars:
            raise ApiError("prompt_too_long", "The prompt is too long.", param="prompt")
        self._check_not_draining()
        self.places.take()
        started_s = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._lookers, self._preparer.look, request)
        finally:
            self.places.give_back(time.monotonic() - started_s)

    async def count_tokens(self, request: CountTokenRequest) -> int:
        self._check_model(request.model)
        if len(request.prompt) > self.settings.limits.max_prompt_chars:
            raise ApiError("prompt_too_long", "The prompt is too long to be counted.", param="prompt")
        return len(await self._in_thread(self._preparer.encode, request.prompt))

    async def model_details(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        manifest = self.run.manifest
        return {
            "context_length": self.engine.max_context,
            "model": self.name,
            "template": manifest.template,
            "image_size": manifest.image_size,
            "image_mode": manifest.image_mode,
            "image_tokens": self.run.model.num_patches,
            "stages": [stage.name for stage in manifest.lineage],
        }

    def start(self) -> None:
        """Called in the event loop before the first request."""
        self._pump = EventPump(asyncio.get_running_loop(), self._on_event)

    async def drain(self) -> None:
        """Take nothing new; let running answers finish within ``drain_s``, then break them off so that a controller
        continues them elsewhere."""
        self.draining = True
        deadline = time.monotonic() + self.settings.worker.drain_s
        while self.places.taken and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for job in list(self.jobs):
            job.answer.fail(ApiError("draining", "The worker is shutting down."))
            if job.handle is not None:
                job.handle.cancel()
        if self.jobs:
            await asyncio.sleep(0.5)

    def close(self) -> None:
        """Stop the engine and the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._lookers.shutdown(wait=False, cancel_futures=True)
        self.engine.close()

    # From request to engine; runs in a thread of ``_threads``.

    def _prepare(self, request: GenerateRequest, received_s: float) -> Job:
        prepared = self._preparer.prepare(request)
        job = Job(
            answer=Answer(self._nothing),
            request=request,
            prompt_tokens=prepared.prompt_tokens,
            resumed=prepared.resumed,
            request_id=REQUEST_ID.get() or "",
            images=prepared.images if self._retention else (),
            num_tokens=len(request.resume_ids or ()),
            received_s=received_s,
        )
        job.answer = Answer(lambda: self._stop(job))
        self.jobs.add(job)
        if prepared.generation is None:
            # The lost worker had generated everything and could only not say so any more.
            reason: FinishReason = "stop" if job.resumed is not None and job.resumed.ended else "length"
            self._push(job, Finished(reason, "", EngineUsage(0, 0)))
            return job
        try:
            job.handle = self.engine.submit(prepared.generation)
        except EngineError as error:
            self.jobs.discard(job)
            raise api_error(error) from None
        request.images = None  # as text they are large, and they are not needed any more
        job.handle.add_listener(lambda event: self._push(job, event))
        return job

    def _push(self, job: Job, event: Event) -> None:
        assert self._pump is not None, "start() comes before the first request"
        self._pump.push(job, event)

    # From engine to answer; runs in the event loop.

    def _on_event(self, job: Job, event: Event) -> None:
        if isinstance(event, Delta):
            self._on_delta(job, event)
        else:
            self._on_finished(job, event)

    def _on_delta(self, job: Job, delta: Delta) -> None:
        if job.first_token_s is None:
            job.first_token_s = time.monotonic()
            self.metrics.first_token.observe(job.first_token_s - job.received_s)
        job.num_tokens += len(delta.token_ids)
        self.metrics.generated_tokens.inc(len(delta.token_ids))
        if job.resumed is None:
            job.text += delta.text
        else:
            job.text = job.resumed.add(delta.token_ids)
        logprobs = tuple(
            TokenLogprob(t.text, t.logprob, tuple((text, value) for _, text, value in t.top)) for t in delta.logprobs
        )
        job.answer.put(Chunk(job.text, token_ids=delta.token_ids, logprobs=logprobs))
        if job.resumed is not None and job.resumed.ended and job.handle is not None:
            # A stop string that began with the lost worker and ended here; the engine saw only its end.
            self._end(job, "stop")
            job.handle.cancel()

    def _on_finished(self, job: Job, finished: Finished) -> None:
        reason = finished.finish_reason
        if job.resumed is not None:
            job.text = job.resumed.flush()
        elif reason in ("stop", "length"):
            job.text = finished.text
            job.num_tokens = finished.usage.completion_tokens
        if reason in ("stop", "length"):
            self._end(job, reason)
        elif reason == "deadline":
            job.answer.fail(ApiError("deadline", "The answer took longer than this server allows."))
        elif reason == "error" and finished.error is not None:
            log(logger, logging.ERROR, "request failed", code=finished.error.code)
            job.answer.fail(api_error(finished.error))
        job.answer.finish()
        self._release(job, reason)

    def _end(self, job: Job, reason: str) -> None:
        job.answer.put(Chunk(job.text, finish_reason=reason, usage=job.usage()))
        job.answer.finish()

    def _release(self, job: Job, reason: str) -> None:
        """The engine is done with it: give the place back and take note."""
        now_s = time.monotonic()
        self.jobs.discard(job)
        self.places.give_back(now_s - job.received_s)
        self.metrics.finished.labels(reason).inc()
        self.metrics.prompt_tokens.inc(job.prompt_tokens)
        if job.first_token_s is not None and job.num_tokens > 1:
            self.metrics.per_token.observe((now_s - job.first_token_s) / (job.num_tokens - 1))
        log(
            logger,
            logging.INFO,
            "answer",
            request_id=job.request_id,
            reason=reason,
            prompt_tokens=job.prompt_tokens,
            new_tokens=job.num_tokens,
            seconds=round(now_s - job.received_s, 3),
        )
        if self._retention is not None:
            self._threads.submit(
                self._retention.keep, job.request_id, job.request.prompt, job.images, job.text, model=self.name
            )

    async def _stop(self, job: Job) -> None:
        """The reader is done or has left. The engine's last event gives the place back, within one step."""
        if job.handle is not None:
            job.handle.cancel()

    def _abandon(self, preparing: asyncio.Future[Job], received_s: float) -> None:
        if preparing.cancelled() or preparing.exception() is not None:
            self.places.give_back(time.monotonic() - received_s)
        elif (handle := preparing.result().handle) is not None:
            handle.cancel()

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        request_id = REQUEST_ID.get()

        def call() -> Any:
            REQUEST_ID.set(request_id)
            return function(*args)

        return await loop.run_in_executor(self._threads, call)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        snapshot = self.engine.stats()
        for name in type(snapshot).__slots__:
            if isinstance(getattr(snapshot, name), int | float):
                gauge(f"engine_{name}", f"{name.replace('_', ' ')} of the engine", partial(self._stat, name))

    def _stat(self, name: str) -> float:
        return float(getattr(self.engine.stats(), name))


def load_worker(path: Path, settings: ServeSettings) -> Worker:
    """Load a run directory and start an engine over it.

    Raises:
        UserError: the run, the device or the engine's settings are wrong.
    """
    import torch

    from babydoctor.engine.engine import Engine, EngineSettings
    from babydoctor.model.run_dir import load_run

    device = settings.worker.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_run(path, device=device)
    known = {item.name for item in fields(EngineSettings)}
    if unknown := sorted(settings.engine.keys() - known):
        raise UserError(f"engine.{unknown[0]} is not a setting of the engine; it has {', '.join(sorted(known))}")
    # How many may wait is decided at admission, before an image is touched; the engine's own limit lies above that.
    values = {"max_queue": max(256, settings.limits.max_queue)} | settings.engine
    engine = Engine(run.model, run.tokenizer, EngineSettings(**values)).start()
    name = settings.worker.model_name or path.resolve().name
    return Worker(run, engine, settings, name)


def build_worker_app(worker: Worker, secrets: Secrets, address: str | None) -> FastAPI:
    """The worker as an ASGI application.

    Args:
        address: the URL to register with the controller; None: the worker stands alone.
    """
    own = worker.settings.worker
    registration = None
    if own.controller and address:
        registration = Registration(own.controller, address, worker.status, secrets.registration, own.heart_beat_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        beating = asyncio.ensure_future(registration.run()) if registration else None
        yield
        if beating is not None:
            beating.cancel()
        worker.close()

    async def drain() -> None:
        worker.draining = True
        if registration is not None:
            await registration.leave()
        await worker.drain()

    app = FastAPI(
        title="BabyDoctor worker",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        description="LLaVA's worker wire, FastChat's additions and OpenAI's chat completions. Research use only.",
        lifespan=lifespan,
    )
    app.state.backend = worker
    app.state.drain = drain
    add_error_handlers(app)

    @app.post("/worker_get_status", tags=["LLaVA"], responses=errors(*BODY_ERRORS))
    async def worker_get_status() -> WorkerStatus:
        """Models, speed and queue of this worker."""
        return worker.status()

    add_common_routes(app, worker)
    keys = (*secrets.api_keys, *([secrets.registration] if secrets.registration else ())) if secrets.api_keys else ()
    app.add_middleware(
        Gate, keys=Keys(keys), open_paths=OPEN_PATHS, limits=worker.settings.limits, metrics=worker.metrics
    )
    return app
