"""The engine: one thread that owns the model and answers many requests at once.

Requests come in by a queue and join the running batch between steps. A step computes one token for every decoding
request and, in the rows that are left, pieces of prompts in the order of arrival; so long prompts do not stop running
answers. What goes wrong with one request ends that request only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LlamaForCausalLM

from babydoctor.engine.allocator import keep_freed_memory, use_huge_pages
from babydoctor.engine.decoder import Chunk, Decoder, DecodeRows
from babydoctor.engine.graphs import DecodeGraphs
from babydoctor.engine.kv_cache import Content, FeatureCache
from babydoctor.engine.limits import check_request
from babydoctor.engine.request import (
    EngineClosedError,
    EngineError,
    FinishReason,
    GenerationHandle,
    GenerationRequest,
    ImageInput,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestFailedError,
)
from babydoctor.engine.sampling import likeliest
from babydoctor.engine.sequence import Job, build_content
from babydoctor.engine.settings import EngineSettings, build_memory
from babydoctor.engine.stats import EngineStats
from babydoctor.engine.threads import release_team
from babydoctor.model.image_attention import image_attention
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)


class VisionLanguageModel(Protocol):
    """What the engine needs of ``BabyDoctor``."""

    language_model: LlamaForCausalLM

    @property
    def num_patches(self) -> int: ...

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor: ...


class Engine:
    """Answers requests with ``model`` until closed. ``submit``, ``stats``, ``drain`` and ``close`` are thread-safe.

    Raises:
        UserError: the settings do not fit the model or the machine.
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: Any, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self.model = model
        self.tokenizer = tokenizer
        language_model = model.language_model
        norm = language_model.model.norm.weight
        self.memory = build_memory(self.settings, language_model.config, norm.dtype, norm.device)
        self.decoder = Decoder(
            language_model, self.memory, pack=self.settings.pack_weights, compile_layers=self.settings.compile
        )
        self.graphs: DecodeGraphs | None = None
        if self.settings.cuda_graphs:
            if norm.device.type != "cuda":
                raise UserError("engine.cuda_graphs=true needs a model on a CUDA device; set it to false")
            self.graphs = DecodeGraphs(self.decoder)
        self.features = FeatureCache(self.settings.image_cache_bytes)
        self.eos = end_tokens(language_model, tokenizer)
        self.rows_per_step = self.settings.rows_per_step(norm.device)
        self._vocabulary = language_model.config.vocab_size
        self._changed = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._errands: deque[tuple[GenerationRequest, tuple[int, ...], Future[np.ndarray]]] = deque()
        self._running: list[Job] = []
        self._num_running = 0
        self._accepting = True
        self._stopping = False
        self._broken: BaseException | None = None
        self._stats = EngineStats(max_running=self.memory.max_running, kv_bytes=self.memory.num_bytes)
        self._thread = threading.Thread(target=self._run, name="babydoctor-engine", daemon=True)

    # Called from any thread.

    @property
    def max_context(self) -> int:
        """Positions that prompt and answer may take together."""
        return self.memory.capacity

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        return self._accepting and self._thread.is_alive()

    def start(self) -> Engine:
        if self.memory.device.type == "cpu":
            keep_freed_memory()
            use_huge_pages()
            release_team()  # this thread has loaded and packed the weights; from now on another one computes
        self._thread.start()
        return self

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request. ``max_new_tokens`` is cut to what the context leaves room for.

        Raises:
            InvalidRequestError, PromptTooLongError, QueueFullError, EngineClosedError: it was not queued.
        """
        self._check(request)
        image_mask = None if request.image_mask is None else np.asarray(request.image_mask, bool)
        content = build_content(request.input_ids, image_mask, tuple(image.key for image in request.images))
        room = self.max_context - len(content)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt takes {len(content)} positions, images included; this model has room for "
                f"{self.max_context - 1}"
            )
        handle = GenerationHandle(request, self._wake)
        job = Job(handle, content, min(request.max_new_tokens, room), self.tokenizer)
        with self._changed:
            if not self._accepting:
                raise EngineClosedError("the engine takes no new requests")
            if len(self._inbox) >= self.settings.max_queue + self.memory.max_running - self._num_running:
                raise QueueFullError(f"{len(self._inbox)} requests wait already")
            self._inbox.append(job)
            self._changed.notify_all()
        return handle

    def stats(self) -> EngineStats:
        """A snapshot of counters and of the present load."""
        with self._changed:
            stats = EngineStats(**{name: getattr(self._stats, name) for name in EngineStats.__slots__})
            stats.queued = len(self._inbox)
            stats.running = self._num_running
            stats.finished = dict(self._stats.finished)
            stats.first_token_s = self._stats.first_token_s.copy()
            stats.per_token_s = self._stats.per_token_s.copy()
            stats.image_cache_hits, stats.image_cache_misses = self.features.hits, self.features.misses
            stats.image_cache_bytes = self.features.num_bytes
            stats.kv_used = self.memory.used_fraction
        return stats

    def attention_map(
        self, request: GenerationRequest, answer_ids: Sequence[int], timeout_s: float | None = None
    ) -> np.ndarray:
        """Where the model looked while it gave this answer; computed between two steps of the running answers.

        Returns:
            Float32 ``[A, N * P]``: for each answer token the attention to each image position, see ``attention.py``.

        Raises:
            InvalidRequestError, PromptTooLongError, EngineClosedError: it cannot be computed.
            TimeoutError: not within ``timeout_s``.
        """
        self._check(request)
        if not request.images or not answer_ids:
            raise InvalidRequestError("an attention map needs an image and an answer")
        if len(request.input_ids) + len(answer_ids) > self.max_context:
            raise PromptTooLongError(f"prompt and answer take more than {self.max_context} positions")
        result: Future[np.ndarray] = Future()
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise EngineClosedError("the engine is closed")
            self._errands.append((request, tuple(answer_ids), result))
            self._changed.notify_all()
        return result.result(timeout_s)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new requests and wait for the ones that are here. False if some are left after ``timeout_s``."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._inbox and not self._num_running, timeout_s)

    def close(self) -> None:
        """Cancel what is left and stop the thread. Calling it again changes nothing."""
        with self._changed:
            self._accepting = False
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check(self, request: GenerationRequest) -> None:
        check_request(request, vocabulary=self._vocabulary, num_patches=self.model.num_patches)

    # Called on the engine's thread only.

    def _run(self) -> None:
        if self.settings.num_threads is not None:
            torch.set_num_threads(self.settings.num_threads)
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step()
        except BaseException as error:
            self._broken = error
            logger.exception("the engine stopped because of an error of its own")
        finally:
            with self._changed:
                self._accepting = False
            reason: FinishReason = "error" if self._broken else "cancelled"
            failure = RequestFailedError("the engine stopped") if self._broken else None
            for job in [*self._running, *self._inbox]:
                self._end(job, reason, failure)
            for _, _, result in self._errands:
                result.set_exception(EngineClosedError("the engine is closed"))

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._inbox or self._running or self._errands)
            return not self._stopping

    def _step(self) -> None:
        """Let go of cancelled and late requests, admit waiting ones, compute one step, give out the tokens."""
        self._sweep()
        if self._errands:
            self._run_errand(*self._errands.popleft())
        self._admit()
        jobs, rows, chunks, chunk_jobs = self._plan()
        if not jobs and not chunk_jobs:
            return
        self._stats.steps += 1
        try:
            if self.graphs is not None and not chunks:
                logits = self.graphs.forward(rows)
            else:
                logits = self.decoder.forward(rows, chunks)
        except Exception:
            self._step_one_by_one([*jobs, *chunk_jobs])
            return
        self._take_logits(jobs, chunks, chunk_jobs, logits)

    def _run_errand(self, request: GenerationRequest, answer_ids: tuple[int, ...], result: Future[np.ndarray]) -> None:
        try:
            mask = np.concatenate([np.asarray(request.image_mask, bool), np.zeros(len(answer_ids), bool)])
            ids = np.concatenate([np.asarray(request.input_ids), np.asarray(answer_ids)])
            content = build_content(ids, mask, tuple(image.key for image in request.images))
            embeds = self._embed(ids, content, request.images, 0)
            looked = image_attention(self.model.language_model, embeds, torch.from_numpy(mask), len(answer_ids))
            result.set_result(looked.numpy())
        except Exception as error:
            result.set_exception(error)

    def _sweep(self) -> None:
        now = time.monotonic()
        with self._changed:
            waiting = list(self._inbox)
        for job in [*self._running, *waiting]:
            if job.handle.cancelled:
                self._end(job, "cancelled")
            elif job.deadline is not None and now >= job.deadline:
                self._end(job, "deadline")

    def _admit(self) -> None:
        """Give slots to waiting requests, but no more than this step can begin to read.

        Encoding an image takes as long as a step, so requests are let in one by one as their turn comes.
        """
        while sum(job.num_left for job in self._running) + self._num_decoding() < self.rows_per_step:
            with self._changed:
                if not self._inbox or not self.memory.num_free:
                    return
                job = self._inbox.popleft()
                self._running.append(job)
                self._num_running = len(self._running)
            job.started_at = time.monotonic()
            try:
                job.claim = self.memory.claim(job.prompt)
                assert job.claim is not None, "no free slot"
                job.num_computed = job.claim.num_reused
                job.embeds = self._embed(
                    np.asarray(job.request.input_ids), job.prompt, job.request.images, job.num_computed
                )
            except Exception as error:
                self._fail(job, error)
                continue
            self._stats.prompt_tokens += len(job.prompt)
            self._stats.cached_prompt_tokens += job.num_computed

    def _num_decoding(self) -> int:
        return sum(job.decoding for job in self._running)

    def _embed(self, input_ids: np.ndarray, content: Content, images: Sequence[ImageInput], start: int) -> torch.Tensor:
        """Input embeddings ``[T - start, D]`` of the positions from ``start`` on."""
        ids = torch.from_numpy(input_ids[start:].astype(np.int64)).to(self.memory.device)
        embeds = self.decoder.embed_tokens(ids)
        for (first, _), image in zip(content.images, images, strict=True):
            end = first + self.model.num_patches
            if end > start:
                features = self._image_features(image)
                begin = max(first, start)
                embeds[begin - start : end - start] = features[begin - first :].to(embeds.dtype)
        return embeds

    def _image_features(self, image: ImageInput) -> torch.Tensor:
        """Projected features ``[P, D]``, from the cache if the same image was seen before."""
        features = self.features.get(image.key)
        if features is not None:
            return features
        pixels = image.pixels() if callable(image.pixels) else image.pixels
        pixels = np.asarray(pixels, np.float32)
        if not np.isfinite(pixels).all():
            raise InvalidRequestError("an image's pixels are not all finite numbers")
        features = self.model.encode_images(torch.from_numpy(pixels)[None].to(self.memory.device))[0]
        features = features.to(self.decoder.dtype)
        self.features.put(image.key, features)
        return features

    def _plan(self) -> tuple[list[Job], DecodeRows, list[Chunk], list[Job]]:
        """Decoding requests by slot, and pieces of prompts for the rows that are left."""
        jobs = sorted((job for job in self._running if job.decoding), key=lambda job: job.slot)
        rows = DecodeRows(
            [job.generated[-1] for job in jobs], [job.slot for job in jobs], [job.num_computed for job in jobs]
        )
        chunks, chunk_jobs = [], []
        left = max(self.rows_per_step - len(jobs), 1)
        for job in self._running:
            if job.decoding or not left:
                continue
            chunk = self._next_chunk(job, left)
            left -= chunk.end - chunk.start
            chunks.append(chunk)
            chunk_jobs.append(job)
        return jobs, rows, chunks, chunk_jobs

    def _next_chunk(self, job: Job, limit: int) -> Chunk:
        assert job.embeds is not None, "a prompt that is read has its embeddings"
        length = min(job.num_left, limit)
        begin = len(job.embeds) - job.num_left
        return Chunk(job.slot, job.num_computed, job.embeds[begin : begin + length], length == job.num_left)

    def _take_logits(self, jobs: list[Job], chunks: list[Chunk], chunk_jobs: list[Job], logits: torch.Tensor) -> None:
        """Book what was computed, and give each request whose turn it is its next token."""
        for job in jobs:
            job.num_computed += 1
        receivers = list(jobs)
        for job, chunk in zip(chunk_jobs, chunks, strict=True):
            job.num_computed = chunk.end
            assert job.claim is not None, "a running job has a slot"
            job.claim.slot.content = job.prompt.head(chunk.end)
            if chunk.final:
                job.embeds = None
                receivers.append(job)
        if not receivers:
            return
        assert len(receivers) == len(logits), (len(receivers), logits.shape)
        logits = logits.float()
        tokens, sound = likeliest(logits)
        for row, job in enumerate(receivers):
            try:
                if not sound[row]:
                    raise RequestFailedError("the model's output is not a number; its input or its weights are damaged")
                self._take_token(job, logits[row], tokens[row])
            except Exception as error:
                self._fail(job, error, scrub=not sound[row])

    def _take_token(self, job: Job, logits: torch.Tensor, likeliest_token: int) -> None:
        token, logprobs = job.choose(logits, likeliest_token)
        self._stats.generated_tokens += 1
        reason = job.append(token, logprobs, self.eos)
        if reason is not None:
            self._end(job, reason)

    def _step_one_by_one(self, jobs: Iterable[Job]) -> None:
        """After a step has failed, compute it again for each request alone, so that only the guilty one ends.

        That is safe: a step writes to positions that no finished computation has read.
        """
        for job in jobs:
            rows, chunks = DecodeRows([], [], []), []
            try:
                if job.decoding:
                    rows = DecodeRows([job.generated[-1]], [job.slot], [job.num_computed])
                else:
                    chunks = [self._next_chunk(job, self.rows_per_step)]
                logits = self.decoder.forward(rows, chunks)
            except Exception as error:
                self._fail(job, error, scrub=True)
                continue
            self._take_logits([job] if job.decoding else [], chunks, [job] if chunks else [], logits)

    def _fail(self, job: Job, error: Exception, *, scrub: bool = False) -> None:
        if not isinstance(error, EngineError):
            # The message of a foreign error may quote the prompt: it goes to the caller, never to the log.
            logger.error("request %s failed: %s", job.request.request_id or "-", type(error).__name__)
            wrapped = RequestFailedError(f"{type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        self._end(job, "error", error, scrub=scrub)

    def _end(self, job: Job, reason: FinishReason, error: EngineError | None = None, *, scrub: bool = False) -> None:
        """Take the slot back, then tell the caller: whoever reads the last event finds the memory free."""
        if job.claim is not None:
            job.claim.slot.content = job.computed_content()
            self.memory.release(job.claim.slot, scrub=scrub)
        finished = job.finish(reason, error)
        with self._changed:
            if job in self._running:
                self._running.remove(job)
            elif job in self._inbox:
                self._inbox.remove(job)
            self._num_running = len(self._running)
            self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1
            if finished.first_token_s is not None:
                self._stats.first_token_s.observe(finished.first_token_s)
            if job.first_token_at is not None and len(job.generated) > 1:
                spent = job.last_token_at - job.first_token_at
                self._stats.per_token_s.observe(spent / (len(job.generated) - 1))
            self._changed.notify_all()
        job.embeds = None
        job.handle.publish(finished)


def end_tokens(language_model: LlamaForCausalLM, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    ends: set[int] = set()
    for source in (tokenizer, getattr(language_model, "generation_config", None)):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            ends.update(eos if isinstance(eos, list | tuple) else [eos])
    return frozenset(ends)
