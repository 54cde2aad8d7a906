"""The engine: one thread that owns the model and answers many requests at once.

Requests wait in a queue and join the running batch between steps. A step computes one token for every decoding request
and fills its remaining rows with pieces of prompts in order of arrival, so long prompts do not stall running answers.
An error in one request ends that request only.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch

from babydoctor.engine.backend import build_decoder, build_embedder, uses_cpu_operator
from babydoctor.engine.core import EngineCore, Job, RunningJob
from babydoctor.engine.kv_cache import FeatureCache
from babydoctor.engine.prompt import VisionLanguageModel
from babydoctor.engine.request import (
    EngineClosedError,
    GenerationHandle,
    GenerationRequest,
    PromptTooLongError,
    QueueFullError,
)
from babydoctor.engine.sequence import Sequence, build_content
from babydoctor.engine.settings import EngineSettings, build_kv_cache
from babydoctor.engine.stats import EngineStats
from babydoctor.engine.tokens.stops import end_tokens
from babydoctor.engine.validate import check_request


class Engine:
    """Answers requests with ``model`` until closed. ``submit``, ``stats``, ``drain`` and ``close`` are thread-safe.

    Args:
        template_ends: ids with which the conversation template ends an answer. Those of the tokenizer and of the
            model's generation settings end it too.

    Raises:
        UserError: the settings do not fit the model or the machine.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Any,
        settings: EngineSettings | None = None,
        *,
        template_ends: Collection[int] = (),
    ) -> None:
        self.settings = settings or EngineSettings()
        self.model = model
        self.tokenizer = tokenizer
        language_model = model.language_model
        norm = language_model.model.norm.weight
        on_operator = uses_cpu_operator(language_model, self.settings)
        kv_dtype = torch.bfloat16 if on_operator else None
        self.settings.context(language_model.config)  # an error comes before weights are copied
        allocate = partial(build_kv_cache, self.settings, language_model.config, norm.dtype, norm.device, kv_dtype)
        self.decoder = build_decoder(language_model, allocate, self.settings, on_cpu_operator=on_operator)
        self.kv_cache = self.decoder.kv_cache
        self.features = FeatureCache(self.settings.image_cache_bytes)
        self.eos = end_tokens(language_model, tokenizer) | frozenset(template_ends)
        self._core = EngineCore(
            self.decoder,
            build_embedder(model, self.decoder, self.features),
            eos=self.eos,
            rows_per_step=self.settings.rows_per_step(norm.device),
        )
        self._vocab_size = language_model.config.vocab_size
        self._thread = threading.Thread(target=self._core.run, name="babydoctor-engine", daemon=True)

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together, image slots included."""
        return self.kv_cache.capacity

    @property
    def vocab_size(self) -> int:
        """Size of the logits' last dimension."""
        return self._vocab_size

    @property
    def healthy(self) -> bool:
        """True while the engine's thread runs and accepts requests."""
        return self._core.accepting and self._thread.is_alive()

    @property
    def seconds_in_step(self) -> float:
        """How long the step that is being computed has taken so far; 0 between steps. Takes no lock."""
        began_s = self._core.step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def start(self) -> Engine:
        """Start the engine's thread."""
        if self.settings.on_start is not None:
            self.settings.on_start(self.kv_cache.device.type, self.settings.num_threads)
        self._thread.start()
        return self

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request. ``max_new_tokens`` is reduced to what the context has left after the prompt.

        Raises:
            InvalidRequestError: a value of the request is out of range.
            PromptTooLongError: the prompt leaves no room for an answer.
            QueueFullError: as many requests wait as the settings allow.
            EngineClosedError: the engine is draining or closed.
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
        sequence = Sequence(handle, content, min(request.max_new_tokens, room), self.tokenizer)
        with self._core.changed:
            if not self._core.accepting:
                raise EngineClosedError("the engine takes no new requests")
            if len(self._core.waiting) >= self.settings.max_queue + self.kv_cache.max_running - self._core.num_running:
                raise QueueFullError(f"{len(self._core.waiting)} requests wait already")
            self._core.waiting.append(sequence)
            self._core.changed.notify_all()
        return handle

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges."""
        with self._core.changed:
            return dataclasses.replace(
                self._core.stats,
                queued=len(self._core.waiting),
                running=self._core.num_running,
                jobs=len(self._core.jobs),
                finished=dict(self._core.stats.finished),
                image_cache_hits=self.features.hits,
                image_cache_misses=self.features.misses,
                image_cache_bytes=self.features.num_bytes,
                kv_used=self.kv_cache.used_fraction,
            )

    def start_job(self, job: Job) -> RunningJob:
        """Run other work with the model between the steps of running answers. Cancel it through its ``ended``.

        Raises:
            EngineClosedError: the engine is closed.
        """
        running = RunningJob(job, Future())
        with self._core.changed:
            if self._core.stopping or not self._thread.is_alive():
                raise EngineClosedError("the engine is closed")
            self._core.jobs.append(running)
            self._core.changed.notify_all()
        return running

    def drain(self, timeout_s: float | None = None) -> bool:
        """Accept no new requests and wait for the accepted ones. False if some are left after ``timeout_s``."""
        with self._core.changed:
            self._core.accepting = False
            return self._core.changed.wait_for(
                lambda: not (self._core.waiting or self._core.num_running or self._core.num_ending), timeout_s
            )

    def close(self) -> None:
        """Cancel what is left and stop the thread. A second call has no effect."""
        with self._core.changed:
            self._core.accepting = False
            self._core.stopping = True
            self._core.changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._core.changed:
            self._core.changed.notify_all()

    def _check(self, request: GenerationRequest) -> None:
        check_request(request, vocab_size=self._vocab_size, num_patches=self.model.num_patches)
