"""A worker: one model behind an HTTP server.

A request passes ``protocol -> admission -> preprocess -> engine -> streaming``. The engine's thread owns the model.
Everything here is asynchronous, except that a few threads decode images and tokenize. A request slot is freed only when
the engine has ended the request, whatever the client does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from babydoctor.cores import num_cores
from babydoctor.engine.request import Delta, EngineError, Event, Finished, FinishReason, Usage
from babydoctor.imaging.isolation import shared_pool
from babydoctor.serve.api.admission import check_image_count, check_request
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import AttentionRequest, CountTokenRequest, GenerateRequest
from babydoctor.serve.api.streaming import AnswerStream
from babydoctor.serve.logs import REQUEST_ID, log
from babydoctor.serve.settings import ServeSettings
from babydoctor.serve.worker.answering import AnsweredRequest, EventPump
from babydoctor.serve.worker.backend import SingleModelBackend, draining_error
from babydoctor.serve.worker.certainty import CertaintyMeter
from babydoctor.serve.worker.health import Health
from babydoctor.serve.worker.occlusion import OcclusionMaps
from babydoctor.serve.worker.preprocess import Preprocessor, api_error
from babydoctor.serve.worker.retention import Retention

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine
    from babydoctor.model.run_dir import Run

logger = logging.getLogger(__name__)


class Worker(SingleModelBackend):
    """The backend behind the worker's routes.

    Args:
        run: the loaded run directory.
        engine: a started engine for the run's model.
    """

    def __init__(self, run: Run, engine: Engine, settings: ServeSettings, name: str) -> None:
        super().__init__(settings, name, run.manifest.template, engine.kv_cache.max_running)
        self.run = run
        self.engine = engine
        self._open: set[AnsweredRequest] = set()
        self._preprocessor = Preprocessor(run, engine, settings.limits)
        self._occlusion_maps = OcclusionMaps(run, engine, self._preprocessor, settings.limits.request_timeout_s)
        self._certainty = CertaintyMeter(run, engine, settings.limits.request_timeout_s)
        self._threads = ThreadPoolExecutor(max(2, num_cores() // 2), thread_name_prefix="preprocess")
        self.health = Health(engine, shared_pool(), settings.limits.stuck_s)
        self._watching: asyncio.Task[None] | None = None
        self._pump: EventPump | None = None
        self._retention = Retention(folder) if (folder := settings.worker.retention_dir) else None
        self._add_gauges()

    # The methods of a backend that the common routes call.

    def unready(self) -> str | None:
        return "The worker is shutting down." if self.draining else self.health.problem()

    async def open(self, request: GenerateRequest) -> AnswerStream:
        self._check_model(request.model)
        self._check_not_draining()
        check_request(request, self.settings.limits)
        self.slots.take()
        received_s = time.monotonic()
        preparing = asyncio.ensure_future(self._in_thread(self._prepare, request, received_s))
        try:
            answered: AnsweredRequest = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # A thread cannot be cancelled. If it still submits the request, ``_abandon`` cancels it in the engine.
            preparing.add_done_callback(lambda done: self._abandon(done, received_s))
            raise
        except BaseException:
            self.slots.free(time.monotonic() - received_s)
            raise
        return answered.answer

    async def attention(self, request: AttentionRequest) -> AsyncGenerator[dict[str, Any], None]:
        self._check_model(request.model)
        check_image_count(request.prompt, request.images, self.settings.limits)
        if len(request.images) != 1:
            raise ApiError("wrong_image_count", "An attention map needs exactly one image.", param="images")
        self._check_prompt_length(request.prompt)
        self._check_not_draining()
        self.slots.take()
        started_s = time.monotonic()
        try:
            async with aclosing(self._occlusion_maps.stream(request)) as messages:
                async for message in messages:
                    yield message
        finally:
            self.slots.free(time.monotonic() - started_s)

    async def count_tokens(self, request: CountTokenRequest) -> int:
        self._check_model(request.model)
        self._check_prompt_length(request.prompt)
        self._check_not_draining()
        self.slots.take()
        started_s = time.monotonic()
        try:
            return len(await self._in_thread(self._preprocessor.encode, request.prompt))
        finally:
            self.slots.free(time.monotonic() - started_s)

    async def model_details(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        manifest = self.run.manifest
        return {
            "context_length": self.engine.max_context,
            "model": self.name,
            "image_tokens": self.run.model.num_patches,
            **{name: getattr(manifest, name) for name in ("template", "image_size", "image_mode", "image_mean")},
            **{name: getattr(manifest, name) for name in ("localization", "familiarity", "confidence")},
            "stages": [stage.name for stage in manifest.lineage],
        }

    def start(self) -> None:
        """Start the event pump and the health check. Called in the event loop before the first request."""
        self._pump = EventPump(asyncio.get_running_loop(), self._on_event)
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        """Log problems. If the engine is stuck, fail its answers, so that a controller continues them elsewhere."""
        known: str | None = None
        since_s = time.monotonic()
        stuck_s = self.settings.limits.stuck_s
        while True:
            await asyncio.sleep(min(1.0, stuck_s / 4))
            problem = self.health.problem()
            if problem != known:
                log(logger, logging.ERROR if problem else logging.INFO, "health", problem=problem)
                since_s = time.monotonic()
            known = problem
            if problem is not None and time.monotonic() - since_s > stuck_s and not self.draining:
                os.kill(os.getpid(), signal.SIGTERM)  # the supervisor starts a new process
            if problem is not None:
                self._fail_open(ApiError("not_ready", problem))
                await asyncio.to_thread(self.health.retry_decoders)

    def _fail_open(self, error: ApiError) -> None:
        for answered in list(self._open):
            answered.answer.fail(error)
            if answered.handle is not None:
                answered.handle.cancel()

    async def drain(self) -> None:
        """Accept no new requests and let running answers finish within ``drain_s``.

        Then end the remaining ones, so that a controller continues them on another worker.
        """
        self.draining = True
        deadline = time.monotonic() + self.settings.worker.drain_s
        while self.slots.taken and time.monotonic() < deadline and self.health.problem() is None:
            await asyncio.sleep(0.05)
        self._fail_open(draining_error())
        if self._open:
            await asyncio.sleep(0.5)

    def close(self) -> None:
        """Stop the engine and the threads."""
        if self._watching is not None:
            self._watching.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._occlusion_maps.close()
        self.engine.close()

    def _check_not_draining(self) -> None:
        super()._check_not_draining()
        if (problem := self.health.problem()) is not None:
            raise ApiError("not_ready", problem)

    def _check_prompt_length(self, prompt: str) -> None:
        limit = self.settings.limits.max_prompt_chars
        if len(prompt) > limit:
            message = f"The prompt has {len(prompt)} characters; the limit is {limit}."
            raise ApiError("prompt_too_long", message, param="prompt")

    # From request to engine; runs in a thread of ``_threads``.

    def _prepare(self, request: GenerateRequest, received_s: float) -> AnsweredRequest:
        pump = self._pump
        assert pump is not None, "start() comes before the first request"
        prepared = self._preprocessor.prepare(request)
        answered = AnsweredRequest(
            answer=AnswerStream(self._nothing),
            request=request,
            prompt_tokens=prepared.prompt_tokens,
            resumed=prepared.resumed,
            request_id=REQUEST_ID.get() or "",
            images=prepared.images if self._retention else (),
            num_tokens=len(request.resume_ids or ()),
            received_s=received_s,
            **self._certainty.measure(request, prepared),
        )
        answered.answer = AnswerStream(lambda: self._stop(answered))
        self._open.add(answered)
        if prepared.generation is None:
            # The lost worker had generated the whole answer, but did not report its end.
            reason: FinishReason = "stop" if answered.resumed is not None and answered.resumed.ended else "length"
            pump.push(answered, Finished(reason, "", Usage(answered.prompt_tokens, answered.num_tokens)))
            pump.wake()
            return answered
        try:
            answered.handle = self.engine.submit(prepared.generation)
        except EngineError as error:
            self._open.discard(answered)
            raise api_error(error) from None
        request.images = None  # large, and no longer needed
        answered.handle.add_listener(partial(pump.push, answered), after_step=pump.wake)
        return answered

    # From engine to answer; runs in the event loop.

    def _on_event(self, answered: AnsweredRequest, event: Event) -> None:
        if isinstance(event, Delta):
            is_first = answered.first_token_s is None
            answered.take_delta(event)
            self.metrics.generated_tokens.inc(len(event.token_ids))
            if is_first and answered.first_token_s is not None:
                self.metrics.first_token.observe(answered.first_token_s - answered.received_s)
            return
        if event.error is not None:
            log(logger, logging.ERROR, "request failed", code=event.error.code)
        answered.take_end(event)
        self._release(answered, event.finish_reason)

    def _release(self, answered: AnsweredRequest, reason: str) -> None:
        """Free the slot of a request that the engine has ended, and record it."""
        now_s = time.monotonic()
        self._open.discard(answered)
        self.slots.free(now_s - answered.received_s)
        self.metrics.finished.labels(reason).inc()
        self.metrics.prompt_tokens.inc(answered.prompt_tokens)
        if answered.first_token_s is not None and answered.num_tokens > 1:
            self.metrics.per_token.observe((now_s - answered.first_token_s) / (answered.num_tokens - 1))
        log(
            logger,
            logging.INFO,
            "answer",
            request_id=answered.request_id,
            reason=reason,
            prompt_tokens=answered.prompt_tokens,
            new_tokens=answered.num_tokens,
            seconds=round(now_s - answered.received_s, 3),
        )
        if self._retention is not None:
            self._threads.submit(
                self._retention.keep,
                answered.request_id,
                answered.request.prompt,
                answered.images,
                answered.text.rstrip(),
                model=self.name,
            )

    async def _stop(self, answered: AnsweredRequest) -> None:
        """Cancel the request when its reader is done or has disconnected. The engine's last event frees the slot."""
        if answered.handle is not None:
            answered.handle.cancel()

    def _abandon(self, preparing: asyncio.Future[AnsweredRequest], received_s: float) -> None:
        if preparing.cancelled() or preparing.exception() is not None:
            self.slots.free(time.monotonic() - received_s)
        elif (handle := preparing.result().handle) is not None:
            handle.cancel()

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        request_id = REQUEST_ID.get()

        def call() -> Any:
            REQUEST_ID.set(request_id)
            with self.health.preparing.job():
                return function(*args)

        return await loop.run_in_executor(self._threads, call)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        stats = self.engine.stats()
        for name in type(stats).__slots__:
            if isinstance(getattr(stats, name), int | float):
                gauge(f"engine_{name}", f"{name.replace('_', ' ')} of the engine", partial(self._stat, name))

    def _stat(self, name: str) -> float:
        return float(getattr(self.engine.stats(), name))
