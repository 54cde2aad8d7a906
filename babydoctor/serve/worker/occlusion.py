"""Occlusion maps of answers for ``/worker_attention``, computed between the steps of running answers, and cached."""

from __future__ import annotations

import concurrent.futures
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.conversation import split_images
from babydoctor.data.tokens import encode
from babydoctor.engine.request import EngineError, ImageInput
from babydoctor.model.occlusion import OcclusionMap, OcclusionTask, build_task
from babydoctor.schema import IGNORE_INDEX, Segment
from babydoctor.serve.api.admission import decode_image
from babydoctor.serve.api.errors import ApiError, overflow_error
from babydoctor.serve.api.protocol import AttentionRequest
from babydoctor.serve.worker.resume import drops_first_space, label_rows

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine
    from babydoctor.model.run_dir import Run

NUM_KEPT = 64
"""Cached replies, so that asking again costs nothing."""


class OcclusionMaps:
    """Computes maps for one run. ``load`` decodes a request's image; ``to_api_error`` converts the engine's errors."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        load: Callable[[bytes, int], ImageInput],
        to_api_error: Callable[[EngineError], ApiError],
        timeout_s: float,
    ) -> None:
        self._run = run
        self._engine = engine
        self._load = load
        self._to_api_error = to_api_error
        self._timeout_s = timeout_s
        self._drops_first_space = drops_first_space(run.tokenizer)
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def reply(self, request: AttentionRequest) -> dict[str, Any]:
        """How much each word of an answer depends on each part of the image, as an ``AttentionReply``. Blocks.

        Raises:
            ApiError: the request is not valid, or the engine is too busy or closed.
        """
        key = hashlib.sha256(repr((request.prompt, request.answer, request.images)).encode()).hexdigest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        reply = self._compute(request)
        with self._lock:
            self._kept[key] = reply
            while len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
        return reply

    def _compute(self, request: AttentionRequest) -> dict[str, Any]:
        task = self._task(request)
        drops = self._run_between_steps(OcclusionMap(self._run.model, task))  # [A, cells, cells]
        answer_ids = task.answer_ids.tolist()
        rows = drops.reshape(len(drops), -1)
        return {
            "grid": list(drops.shape[1:]),
            "tokens": label_rows(self._run.tokenizer, answer_ids, rows, request.answer),
            "method": request.method,
            "localization": self._run.manifest.localization,
        }

    def _run_between_steps(self, job: OcclusionMap) -> np.ndarray:
        try:
            running = self._engine.start_job(job)
        except EngineError as error:
            raise self._to_api_error(error) from None
        try:
            running.ended.result(self._timeout_s)
        except EngineError as error:
            raise self._to_api_error(error) from None
        except (TimeoutError, concurrent.futures.TimeoutError):  # the same class from Python 3.11 on
            running.ended.cancel()
            raise ApiError("deadline", "The model was too busy to compute where it looked.") from None
        return job.result()

    def _task(self, request: AttentionRequest) -> OcclusionTask:
        """Tokens and pixels of the request. The answer is encoded as supervised, so labels mark its tokens."""
        image = self._load(decode_image(request.images[0], 0), 0)
        answer = request.answer
        if self._drops_first_space and not answer[0].isspace() and not request.prompt[-1:].isspace():
            answer = f" {answer}"
        model, segments = self._run.model, (*split_images(request.prompt), Segment(answer, supervised=True))
        whole = encode(segments, self._run.tokenizer, model.num_patches)
        if len(whole.input_ids) > self._engine.max_context:
            raise overflow_error()
        is_answer = whole.labels != IGNORE_INDEX
        pixels = image.pixels() if callable(image.pixels) else image.pixels
        prompt_ids, answer_ids = whole.input_ids[~is_answer], whole.input_ids[is_answer].tolist()
        return build_task(model, prompt_ids, whole.image_mask[~is_answer], pixels, answer_ids)
