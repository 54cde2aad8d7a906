"""The part of the engine that runs on its own thread: admit requests, compute steps, end requests."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from babydoctor.engine.decoder import Decoder
from babydoctor.engine.kv_cache import KVCache
from babydoctor.engine.prompt import PromptEmbedder
from babydoctor.engine.request import (
    EngineClosedError,
    EngineError,
    Event,
    FinishReason,
    GenerationHandle,
    RequestFailedError,
)
from babydoctor.engine.scheduler import StepWork, has_room, mark_computed, plan_batch
from babydoctor.engine.sequence import Sequence
from babydoctor.engine.stats import EngineStats
from babydoctor.engine.tokens.sampling import likeliest

logger = logging.getLogger(__name__)


class Job(Protocol):
    """Other work with the model, done in pieces between the steps of running answers."""

    def run(self) -> Iterator[float]:
        """Do the work. Yield the finished share, 0 to 1, after each piece."""
        ...


@dataclass(eq=False)
class RunningJob:
    """A job and its progress. ``ended.cancel()`` ends it after the piece that is being computed."""

    job: Job
    ended: Future[None]
    share: float = 0.0
    """Share of the work that is done, 0 to 1."""
    pieces: Iterator[float] | None = None
    begun_s: float | None = None
    """When its first piece began (``time.monotonic``); None while it waits behind other jobs."""

    @property
    def left_s(self) -> float | None:
        """Seconds left at the speed so far; None until some of the work is done."""
        share, begun_s = self.share, self.begun_s
        return (time.monotonic() - begun_s) * (1 - share) / share if share > 0 and begun_s is not None else None


class EngineCore:
    """The requests of one engine, and the steps that compute their answers.

    ``changed`` guards what other threads read and write: ``waiting``, ``jobs``, ``num_running``,
    ``num_ending``, ``accepting``, ``stopping`` and ``stats.finished``. Everything else belongs to the engine's thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        embedder: PromptEmbedder,
        *,
        eos: frozenset[int],
        rows_per_step: int,
    ) -> None:
        self.kv_cache: KVCache = decoder.kv_cache
        self.changed = threading.Condition()
        self.waiting: deque[Sequence] = deque()
        self.jobs: deque[RunningJob] = deque()
        self.num_running = 0
        self.num_ending = 0  # requests that have ended and whose last event is not published yet
        self.accepting = True
        self.stopping = False
        self.step_began_s: float | None = None
        self.stats = EngineStats(max_running=self.kv_cache.max_running, kv_bytes=self.kv_cache.num_bytes)
        self._decoder = decoder
        self._embedder = embedder
        self._eos = eos
        self._rows_per_step = rows_per_step
        self._running: list[Sequence] = []
        self._unpublished: list[tuple[GenerationHandle, Event]] = []
        self._is_asynchronous = self.kv_cache.device.type != "cpu"

    def run(self) -> None:
        """Answer requests until ``stopping`` is set. Every request gets its last event, even after an error."""
        error: BaseException | None = None
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self.step_began_s = time.monotonic()
                    self._step()
                    self.step_began_s = None
        except BaseException as stopped_by:
            error = stopped_by
            logger.exception("the engine stopped because of an internal error")
        finally:
            with self.changed:
                self.accepting = False
            reason: FinishReason = "error" if error else "cancelled"
            failure = RequestFailedError("the engine stopped") if error else None
            for sequence in [*self._running, *self.waiting]:
                self._end(sequence, reason, failure)
            self._publish()
            for job in self.jobs:
                if job.ended.set_running_or_notify_cancel():
                    job.ended.set_exception(EngineClosedError("the engine is closed"))

    def _wait_for_work(self) -> bool:
        """Sleep until there is work. False if the engine is closing."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.stopping or self.waiting or self._running or self.jobs,
            )
            return not self.stopping

    def _step(self) -> None:
        """End cancelled and late requests, admit waiting ones, compute one step and publish its tokens."""
        self._end_cancelled_and_late()
        if self.jobs:
            self._advance_job()
        self._admit()
        batch = plan_batch(self._running, self._rows_per_step)
        if batch.sequences:
            self._compute(batch)
        # On a GPU, publish after launching the next step, so that readers of the events run while the GPU computes.
        if not self._is_asynchronous or not self._running:
            self._publish()

    def _compute(self, batch: StepWork) -> None:
        self.stats.steps += 1
        try:
            logits = self._decoder.forward(batch.rows, batch.chunks)
        except Exception:
            self._step_one_by_one(batch.sequences)
            return
        self._publish()
        self._take_logits(batch, logits)

    def _publish(self) -> None:
        """Publish the events of the last step. Readers of several requests are woken up once for all of them."""
        events, self._unpublished = self._unpublished, []
        for after_step in {handle.publish(event) for handle, event in events} - {None}:
            assert after_step is not None
            try:
                after_step()
            except Exception:
                # An error in a listener must not stop the engine.
                logger.exception("the listener of some requests failed")
        if self.num_ending:
            with self.changed:
                self.num_ending = 0
                self.changed.notify_all()

    def _advance_job(self) -> None:
        """Do one piece of the first job."""
        running = self.jobs[0]
        if running.pieces is None:
            running.pieces, running.begun_s = running.job.run(), time.monotonic()
        try:
            if not running.ended.cancelled():
                running.share = next(running.pieces)
                return
        except StopIteration:
            running.share = 1.0
            if running.ended.set_running_or_notify_cancel():
                running.ended.set_result(None)
        except Exception as error:
            if running.ended.set_running_or_notify_cancel():
                running.ended.set_exception(error)
        with self.changed:
            self.jobs.popleft()

    def _end_cancelled_and_late(self) -> None:
        now = time.monotonic()
        with self.changed:
            waiting = list(self.waiting)
        for sequence in [*self._running, *waiting]:
            if sequence.handle.cancelled:
                self._end(sequence, "cancelled")
            elif sequence.deadline is not None and now >= sequence.deadline:
                self._end(sequence, "deadline")

    def _admit(self) -> None:
        """Give slots to waiting requests, but only to as many as this step has rows for.

        Encoding an image takes as long as a step, so admitting a request early would only delay running answers.
        """
        while has_room(self._running, self._rows_per_step):
            with self.changed:
                if not self.waiting or not self.kv_cache.num_free:
                    return
                sequence = self.waiting.popleft()
                self._running.append(sequence)
                self.num_running = len(self._running)
            sequence.started_at = time.monotonic()
            try:
                self._prepare(sequence)
            except Exception as error:
                self._fail(sequence, error)
                continue
            self.stats.prompt_tokens += len(sequence.prompt)
            self.stats.cached_prompt_tokens += sequence.num_computed

    def _prepare(self, sequence: Sequence) -> None:
        """Allocate a slot and embed the part of the prompt that the slot does not hold yet."""
        sequence.allocation = self.kv_cache.allocate(sequence.prompt)
        assert sequence.allocation is not None, "no free slot"
        sequence.num_computed = sequence.allocation.num_reused
        ids = np.asarray(sequence.request.input_ids)
        sequence.embeds = self._embedder.embed(ids, sequence.prompt, sequence.request.images, sequence.num_computed)

    def _take_logits(self, batch: StepWork, logits: torch.Tensor) -> None:
        """Record what was computed and give each sequence its next token."""
        receivers = mark_computed(batch)
        if not receivers:
            return
        assert len(receivers) == len(logits), (len(receivers), logits.shape)
        logits = logits.float()
        tokens, finite = likeliest(logits)
        for row, sequence in enumerate(receivers):
            try:
                if not finite[row]:
                    raise RequestFailedError("the model's output is not a number; its input or its weights are damaged")
                self._take_token(sequence, logits[row], tokens[row])
            except Exception as error:
                self._fail(sequence, error, scrub=not finite[row])

    def _take_token(self, sequence: Sequence, logits: torch.Tensor, likeliest_token: int) -> None:
        token, logprobs = sequence.choose(logits, likeliest_token)
        self.stats.generated_tokens += 1
        delta, reason = sequence.append(token, logprobs, self._eos)
        self._unpublished.append((sequence.handle, delta))
        if reason is not None:
            self._end(sequence, reason)

    def _step_one_by_one(self, sequences: Iterable[Sequence]) -> None:
        """Repeat a failed step for each sequence alone, so that only the sequence that causes the error ends.

        Repeating is safe, because a step only writes to positions that no finished computation has read.
        """
        for sequence in sequences:
            try:
                batch = plan_batch([sequence], self._rows_per_step)
                logits = self._decoder.forward(batch.rows, batch.chunks)
            except Exception as error:
                self._fail(sequence, error, scrub=True)
                continue
            self._take_logits(batch, logits)

    def _fail(self, sequence: Sequence, error: Exception, *, scrub: bool = False) -> None:
        if not isinstance(error, EngineError):
            # The message of an unexpected error may quote the prompt, so only the caller gets it, not the log.
            logger.error("request %s failed: %s", sequence.request.request_id or "-", type(error).__name__)
            wrapped = RequestFailedError(f"{type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        self._end(sequence, "error", error, scrub=scrub)

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: EngineError | None = None, *, scrub: bool = False
    ) -> None:
        """End a request and free its slot. The last event is published after that, when the slot is free."""
        if sequence.allocation is not None:
            sequence.allocation.slot.content = sequence.computed_content()
            self.kv_cache.free(sequence.allocation.slot, scrub=scrub)
        finished = sequence.finish(reason, error)
        with self.changed:
            if sequence in self._running:
                self._running.remove(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)
            self.num_running = len(self._running)
            self.num_ending += 1
            self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
            self.changed.notify_all()
        sequence.embeds = None
        self._unpublished.append((sequence.handle, finished))
