"""A worker: one model behind an HTTP server.

``protocol.parse -> admission -> tokens.encode -> image -> engine -> stream``. The engine's thread owns the model; here
everything is asynchronous, and decoding images and tokenising happen in a few threads beside the event loop. A place
is given back when the engine has really ended a request, however the client behaves.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI

from babydoctor import __version__
from babydoctor.conversation import Template, get_template, split_images
from babydoctor.engine.request import (
    Delta,
    EngineClosedError,
    EngineError,
    Event,
    Finished,
    GenerationHandle,
    GenerationRequest,
    ImageInput,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
)
from babydoctor.image import load_image, to_pixels
from babydoctor.schema import IGNORE_INDEX, Example, Segment, UserError
from babydoctor.serve.admission import Keys, Places, check_image_count, check_request, decode_image
from babydoctor.serve.answers import Answer
from babydoctor.serve.frontend import BODY_ERRORS, OPEN_PATHS, add_common_routes, errors
from babydoctor.serve.logs import REQUEST_ID, log
from babydoctor.serve.metrics import WorkerMetrics
from babydoctor.serve.middleware import Gate, add_error_handlers
from babydoctor.serve.protocol import (
    ERROR_NO_WORKER,
    MAX_NEW_TOKENS,
    ApiError,
    AttentionRequest,
    Chunk,
    CountTokenRequest,
    GenerateRequest,
    TokenLogprob,
    Usage,
    WorkerStatus,
    overflow_error,
)
from babydoctor.serve.registration import Registration
from babydoctor.serve.retention import Retention
from babydoctor.serve.settings import Secrets, ServeSettings
from babydoctor.serve.token_text import ResumedText, drops_first_space, label_rows
from babydoctor.tokens import encode

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine
    from babydoctor.model.checkpoint import Run

logger = logging.getLogger(__name__)

PIXEL_CACHE_SIZE = 64
"""Images whose pixels are kept, so that each turn of a chat does not decode its image again. 0.6 MB each at 224 px."""


@dataclass(eq=False)
class Job:
    """One request between HTTP and engine."""

    answer: Answer
    request: GenerateRequest
    prompt_tokens: int
    resumed: ResumedText | None
    request_id: str
    images: tuple[bytes, ...] = ()
    """Kept only for retention."""
    received_s: float = 0.0
    first_token_s: float | None = None
    text: str = ""
    num_tokens: int = 0
    handle: GenerationHandle | None = None

    def usage(self) -> Usage:
        total = self.prompt_tokens + self.num_tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.num_tokens, total_tokens=total)


class EventPump:
    """Carries events from the engine's thread into the event loop, all of one decode step with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Job, Event], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._events: deque[tuple[Job, Event]] = deque()
        self._is_scheduled = False

    def push(self, job: Job, event: Event) -> None:
        """Called on the engine's thread."""
        self._events.append((job, event))
        if not self._is_scheduled and not self._loop.is_closed():
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        # Cleared first: an event that is pushed from here on schedules another round.
        self._is_scheduled = False
        while self._events:
            self._deliver(*self._events.popleft())


class Worker:
    """The backend behind the worker's routes.

    Args:
        run: the loaded run directory.
        engine: started, over the run's model.
    """

    def __init__(self, run: Run, engine: Engine, settings: ServeSettings, name: str) -> None:
        self.settings = settings
        self.metrics = WorkerMetrics()
        self.name = name
        self.run = run
        self.engine = engine
        self.places = Places(engine.memory.max_running, settings.limits.max_queue)
        self.draining = False
        self.jobs: set[Job] = set()
        self._template = get_template(run.manifest.template)
        self._num_patches = run.model.num_patches
        self._context_length = engine.max_context
        self._drops_first_space = drops_first_space(run.tokenizer)
        self._pixels: OrderedDict[str, np.ndarray] = OrderedDict()
        self._threads = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), thread_name_prefix="prepare")
        # Waits for the engine, so it has a thread of its own: preparing the next requests must not wait with it.
        self._lookers = ThreadPoolExecutor(1, thread_name_prefix="attention")
        self._pump: EventPump | None = None
        retention_dir = settings.worker.retention_dir
        self._retention = Retention(retention_dir) if retention_dir else None
        self._add_gauges()

    # What the common routes ask of a backend.

    def model_names(self) -> list[str]:
        return [self.name]

    def template(self, model: str) -> Template:
        self._check_model(model)
        return self._template

    def unready(self) -> str | None:
        if self.draining:
            return "The worker is shutting down."
        return None if self.engine.healthy else "The engine has stopped; the worker has to be started anew."

    async def open(self, request: GenerateRequest) -> Answer:
        self._check_model(request.model)
        if self.draining:
            raise ApiError(503, "draining", "The worker is shutting down.", retry_after_s=5)
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
            raise ApiError(422, "wrong_image_count", "There must be one image to look at.", param="images")
        if len(request.prompt) > self.settings.limits.max_prompt_chars:
            raise ApiError(422, "prompt_too_long", "The prompt is too long.", param="prompt")
        if self.draining:
            raise ApiError(503, "draining", "The worker is shutting down.", retry_after_s=5)
        self.places.take()
        started_s = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._lookers, self._attention, request)
        finally:
            self.places.give_back(time.monotonic() - started_s)

    async def count_tokens(self, request: CountTokenRequest) -> int:
        self._check_model(request.model)
        if len(request.prompt) > self.settings.limits.max_prompt_chars:
            raise ApiError(422, "prompt_too_long", "The prompt is too long to be counted.", param="prompt")
        return len(await self._in_thread(self._encode, request.prompt))

    async def model_details(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        manifest = self.run.manifest
        return {
            "context_length": self._context_length,
            "model": self.name,
            "template": manifest.template,
            "image_size": manifest.image_size,
            "image_mode": manifest.image_mode,
            "image_tokens": self._num_patches,
            "stages": [stage.name for stage in manifest.lineage],
        }

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            model_names=[self.name],
            speed=self.settings.worker.speed,
            queue_length=self.places.taken,
            template=self._template.name,
            draining=self.draining,
        )

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
            job.answer.fail(ApiError(503, "draining", "The worker is shutting down."))
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
        example = self._encode(request.prompt)
        encoded = [decode_image(text, index) for index, text in enumerate(request.images or ())]
        images = tuple(self._load(data, index) for index, data in enumerate(encoded))
        resume_ids = tuple(request.resume_ids or ())
        if any(token_id >= len(self.run.tokenizer) for token_id in resume_ids):
            raise ApiError(
                422, "bad_resume_ids", "resume_ids holds ids that the model does not have.", param="resume_ids"
            )
        room = self._context_length - len(example)
        max_new_tokens = min(request.max_new_tokens, MAX_NEW_TOKENS, room)
        if max_new_tokens < 1:
            raise overflow_error()
        job = Job(
            answer=Answer(self._nothing),
            request=request,
            prompt_tokens=len(example),
            resumed=self._resume(resume_ids, request) if resume_ids else None,
            request_id=REQUEST_ID.get() or "",
            images=tuple(encoded) if self._retention else (),
            num_tokens=len(resume_ids),
            received_s=received_s,
        )
        job.answer = Answer(lambda: self._stop(job))
        num_left = max_new_tokens - len(resume_ids)
        self.jobs.add(job)
        if job.resumed is not None and (job.resumed.ended or num_left < 1):
            # The lost worker had generated everything and could only not say so any more.
            self._push(job, Finished("stop" if job.resumed.ended else "length", "", self._no_usage()))
            return job
        generation = GenerationRequest(
            input_ids=np.concatenate([example.input_ids, np.array(resume_ids, dtype=np.int32)]),
            image_mask=np.concatenate([example.image_mask, np.zeros(len(resume_ids), dtype=bool)]),
            images=images,
            max_new_tokens=num_left,
            temperature=max(0.0, request.temperature),
            # 0 is allowed on the wire and means the likeliest token alone.
            top_p=max(request.top_p, 1e-6),
            stop=request.stops,
            seed=request.seed,
            logprobs=int(request.logprobs) - 1 if request.logprobs else None,
            timeout_s=self.settings.limits.request_timeout_s,
            request_id=job.request_id,
        )
        try:
            job.handle = self.engine.submit(generation)
        except EngineError as error:
            self.jobs.discard(job)
            raise _api_error(error) from None
        request.images = None  # as text they are large, and they are not needed any more
        job.handle.add_listener(lambda event: self._push(job, event))
        return job

    def _resume(self, token_ids: tuple[int, ...], request: GenerateRequest) -> ResumedText:
        return ResumedText(self.run.tokenizer, token_ids, request.stops, self.engine.eos)

    def _push(self, job: Job, event: Event) -> None:
        assert self._pump is not None, "start() comes before the first request"
        self._pump.push(job, event)

    def _encode(self, prompt: str) -> Example:
        return encode(split_images(prompt), self.run.tokenizer, self._num_patches)

    def _load(self, data: bytes, index: int) -> ImageInput:
        """Decode an image, or find its pixels. The key is its content and the settings: never a name or a size."""
        settings = self.run.manifest.image
        key = hashlib.sha256(repr(settings).encode() + b"\0" + data).hexdigest()
        pixels = self._pixels.get(key)
        if pixels is None:
            try:
                pixels = to_pixels(load_image(data, max_pixels=self.settings.limits.max_pixels), settings)
            except UserError as error:
                text = str(error)
                too_large = "limit is" in text or "too large" in text
                raise ApiError(
                    413 if too_large else 422,
                    "image_too_large" if too_large else "bad_image",
                    text,
                    param=f"images[{index}]",
                ) from None
            self._pixels[key] = pixels
            while len(self._pixels) > PIXEL_CACHE_SIZE:
                self._pixels.popitem(last=False)
        return ImageInput(key, pixels)

    def _attention(self, request: AttentionRequest) -> dict[str, Any]:
        images = tuple(self._load(decode_image(text, index), index) for index, text in enumerate(request.images))
        # The answer is marked as supervised, so that the one place that tokenises says which tokens are its.
        answer_text = request.answer
        if self._drops_first_space and not answer_text[0].isspace() and not request.prompt[-1:].isspace():
            answer_text = f" {answer_text}"
        segments = (*split_images(request.prompt), Segment(answer_text, supervised=True))
        whole = encode(segments, self.run.tokenizer, self._num_patches)
        answer = whole.labels != IGNORE_INDEX
        generation = GenerationRequest(whole.input_ids[~answer], whole.image_mask[~answer], images)
        answer_ids = whole.input_ids[answer].tolist()
        try:
            looked = self.engine.attention_map(generation, answer_ids, self.settings.limits.request_timeout_s)
        except EngineError as error:
            raise _api_error(error) from None
        except TimeoutError:
            raise ApiError(504, "deadline", "The model was too busy to look again.") from None
        edge = math.isqrt(self._num_patches)
        assert edge * edge == self._num_patches, self._num_patches
        return {"grid": [edge, edge], "tokens": label_rows(self.run.tokenizer, answer_ids, looked, request.answer)}

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
            job.answer.fail(ApiError(504, "deadline", "The answer took longer than this server allows."))
        elif reason == "error" and finished.error is not None:
            log(logger, logging.ERROR, "request failed", code=finished.error.code)
            job.answer.fail(_api_error(finished.error))
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

    async def _nothing(self) -> None:
        pass

    @staticmethod
    def _no_usage() -> Any:
        from babydoctor.engine.request import Usage as EngineUsage

        return EngineUsage(0, 0)

    def _check_model(self, model: str) -> None:
        if model not in ("", self.name):
            raise ApiError(
                404, "model_not_found", "This worker serves another model.", error_code=ERROR_NO_WORKER, param="model"
            )

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        request_id = REQUEST_ID.get()

        def call() -> Any:
            REQUEST_ID.set(request_id)
            return function(*args)

        return await loop.run_in_executor(self._threads, call)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("queue_length", "Requests running and waiting", lambda: self.places.taken)
        snapshot = self.engine.stats()
        for name in type(snapshot).__slots__:
            if isinstance(getattr(snapshot, name), int | float):
                gauge(f"engine_{name}", f"{name.replace('_', ' ')} of the engine", partial(self._stat, name))

    def _stat(self, name: str) -> float:
        return float(getattr(self.engine.stats(), name))


def _api_error(error: EngineError) -> ApiError:
    """The engine's reason in the words of the wire."""
    if isinstance(error, PromptTooLongError):
        return overflow_error()
    if isinstance(error, QueueFullError):
        return ApiError(429, "queue_full", "The model is busy. Please try again soon.", retry_after_s=5)
    if isinstance(error, EngineClosedError):
        return ApiError(503, "draining", "The worker is shutting down.", retry_after_s=5)
    if isinstance(error, InvalidRequestError):
        return ApiError(422, "bad_request", "The request contradicts itself.")
    return ApiError(500, "worker_failed", "The model failed at this request; the others go on.")


def load_worker(path: Path, settings: ServeSettings) -> Worker:
    """Load a run directory and start an engine over it.

    Raises:
        UserError: the run, the device or the engine's settings are wrong.
    """
    import torch

    from babydoctor.engine.engine import Engine, EngineSettings
    from babydoctor.model.checkpoint import load_run

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
