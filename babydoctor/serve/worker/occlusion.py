"""Occlusion maps of answers for ``/worker_attention``, computed between the steps of running answers, and cached."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from babydoctor.data.tokens import encode
from babydoctor.engine.request import EngineError
from babydoctor.model.occlusion import OcclusionMap, OcclusionTask, build_task
from babydoctor.schema import IGNORE_INDEX, Segment
from babydoctor.serve.api.admission import decode_image
from babydoctor.serve.api.errors import ApiError, overflow_error
from babydoctor.serve.api.protocol import AttentionRequest
from babydoctor.serve.worker.preprocess import Preprocessor, api_error
from babydoctor.serve.worker.resume import drops_first_space, label_rows

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine
    from babydoctor.model.run_dir import Run

NUM_KEPT = 64
"""Cached replies, so that asking again costs nothing."""

PROGRESS_S = 0.2
"""Seconds between two progress messages."""


class OcclusionMaps:
    """Maps of one run.

    Args:
        preprocessor: the one that prepared the answer, so that its map sees the same prompt and pixels.
        timeout_s: longest time for one map, waiting included.
    """

    def __init__(self, run: Run, engine: Engine, preprocessor: Preprocessor, timeout_s: float) -> None:
        self._run = run
        self._engine = engine
        self._preprocessor = preprocessor
        self._timeout_s = timeout_s
        self._drops_first_space = drops_first_space(run.tokenizer)
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
        # Image decoding and tokenization of maps must not delay those of questions.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attention")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def stream(self, request: AttentionRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Progress messages, then the reply: how much each word of an answer depended on each part of the image.

        Closing the generator ends the work in the engine.

        Raises:
            ApiError: the map cannot be computed.
        """
        key = hashlib.sha256(repr((request.prompt, request.answer, request.images)).encode()).hexdigest()
        if key not in self._kept:
            loop = asyncio.get_running_loop()
            task = await loop.run_in_executor(self._thread, self._task, request)
            job = OcclusionMap(self._run.model, task)
            async with aclosing(self._run_between_steps(job)) as progress:
                async for message in progress:
                    yield message
            self._kept[key] = await loop.run_in_executor(self._thread, self._reply, request, job)
            while len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        yield self._kept[key]

    def _reply(self, request: AttentionRequest, job: OcclusionMap) -> dict[str, Any]:
        drops = job.result()  # [A, cells, cells]
        answer_ids = job.task.answer_ids.tolist()
        rows = drops.reshape(len(drops), -1)
        return {
            "grid": list(drops.shape[1:]),
            "tokens": label_rows(self._run.tokenizer, answer_ids, rows, request.answer),
            "method": request.method,
            "localization": self._run.manifest.localization,
        }

    async def _run_between_steps(self, job: OcclusionMap) -> AsyncGenerator[dict[str, Any], None]:
        """Give the job to the engine; yields its progress until it has ended."""
        deadline = time.monotonic() + self._timeout_s
        try:
            running = self._engine.start_job(job)
        except EngineError as error:
            raise api_error(error) from None
        ended = asyncio.wrap_future(running.ended)
        try:
            while not ended.done():
                yield {"share": running.share, "left_s": running.left_s}
                await asyncio.wait({ended}, timeout=PROGRESS_S)
                if not ended.done() and time.monotonic() > deadline:
                    raise ApiError("deadline", "The model was too busy to compute where it looked.")
            ended.result()
        except EngineError as error:
            raise api_error(error) from None
        finally:
            running.ended.cancel()  # has no effect on a job that has ended

    def _task(self, request: AttentionRequest) -> OcclusionTask:
        """Tokens and pixels of the request. The answer is encoded as supervised, so labels mark its tokens."""
        image = self._preprocessor.load(decode_image(request.images[0], 0), 0)
        answer = request.answer
        if self._drops_first_space and not answer[0].isspace() and not request.prompt[-1:].isspace():
            answer = f" {answer}"
        model = self._run.model
        segments = (*self._preprocessor.split_prompt(request.prompt), Segment(answer, supervised=True))
        whole = encode(segments, self._run.tokenizer, model.num_patches)
        if len(whole.input_ids) > self._engine.max_context:
            raise overflow_error()
        is_answer = whole.labels != IGNORE_INDEX
        pixels = image.pixels() if callable(image.pixels) else image.pixels
        prompt_ids, answer_ids = whole.input_ids[~is_answer], whole.input_ids[is_answer].tolist()
        return build_task(model, prompt_ids, whole.image_mask[~is_answer], pixels, answer_ids)
