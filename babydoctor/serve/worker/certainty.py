"""What a worker adds to an answer: whether the image is like the training images, and the answer's confidence."""

from __future__ import annotations

import concurrent.futures
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.engine.request import EngineError, ImageInput, TokenLogprob
from babydoctor.eval.certainty.calibration import explain_confidence
from babydoctor.model.familiarity import FILE_NAME, DescribeJob, Familiarity
from babydoctor.schema import UserError
from babydoctor.serve.api.certainty import unavailable
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import GenerateRequest
from babydoctor.serve.worker.preprocess import Prepared, api_error

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine
    from babydoctor.model.run_dir import Run

NUM_KEPT = 64
"""Distances of images that are kept, so that a conversation measures its image once."""


class CertaintyMeter:
    """Measures with the figures that ``eval --familiarity`` and ``eval --confidence`` wrote into a run. Thread-safe.

    Raises:
        UserError: the run's reference points are damaged, or belong to another vision tower.
    """

    def __init__(self, run: Run, engine: Engine, timeout_s: float) -> None:
        self._run = run
        self._engine = engine
        self._timeout_s = timeout_s
        self._points = Familiarity.load(run.path)
        num_features = 2 * int(run.model.vision.config.hidden_size or 0)
        if self._points is not None and len(self._points.mean) != num_features:
            raise UserError(
                f"{run.path / FILE_NAME} has {len(self._points.mean)} features and the vision tower gives "
                f"{num_features}; measure it again with `babydoctor eval {run.path} --familiarity`"
            )
        self._distances: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def measure(self, request: GenerateRequest, prepared: Prepared) -> dict[str, Any]:
        """The fields of ``AnsweredRequest`` for the measures that a request asks for."""
        images = prepared.generation.images if prepared.generation is not None else ()
        return {
            "certainty": {"familiarity": self.familiarity(images)} if request.familiarity else {},
            "confidence_of": self.confidence if request.confidence else None,
        }

    def familiarity(self, images: Sequence[ImageInput]) -> dict[str, Any]:
        """Whether the image of a request is like the training images. Waits for the engine, which owns the model.

        Raises:
            ApiError: the engine is closed or too busy.
        """
        if self._points is None:
            return unavailable(
                f"The run {self._run.manifest.name!r} has no {FILE_NAME}. `babydoctor eval RUN --familiarity` makes it."
            )
        if len(images) != 1:
            return unavailable("The request has no image.")
        distance, threshold = self._distance(images[0]), self._points.threshold
        figures = self._run.manifest.familiarity or {}
        return {
            "is_familiar": distance <= threshold,
            "distance": distance,
            "threshold": threshold,
            "false_alarms": figures.get("false_alarms"),
            "measured_on": figures.get("task"),
        }

    def confidence(self, tokens: Sequence[TokenLogprob], is_whole: bool) -> dict[str, Any]:
        """The model's confidence in an answer.

        Args:
            tokens: the tokens of the answer with ``NUM_TOP`` alternatives each.
            is_whole: False if some tokens are not known or the answer was cut off.
        """
        figures = self._run.manifest.confidence
        if figures is None:
            return unavailable(
                f"The run {self._run.manifest.name!r} is not calibrated; `babydoctor eval RUN --confidence` does it."
            )
        if not is_whole:
            return unavailable("The answer was cut off, or another worker wrote its beginning.")
        return explain_confidence(figures, tokens, self._engine.vocab_size)

    def _distance(self, image: ImageInput) -> float:
        with self._lock:
            if image.key in self._distances:
                self._distances.move_to_end(image.key)
                return self._distances[image.key]
        assert self._points is not None
        distance = float(self._points.distances(self._describe(image))[0])
        with self._lock:
            self._distances[image.key] = distance
            while len(self._distances) > NUM_KEPT:
                self._distances.popitem(last=False)
        return distance

    def _describe(self, image: ImageInput) -> np.ndarray:
        pixels = image.pixels() if callable(image.pixels) else image.pixels
        job = DescribeJob(self._run.model, pixels)
        try:
            running = self._engine.start_job(job)
            running.ended.result(self._timeout_s)
        except EngineError as error:
            raise api_error(error) from None
        except (TimeoutError, concurrent.futures.TimeoutError):  # one class from Python 3.11 on
            running.ended.cancel()
            raise ApiError("deadline", "The model was too busy to measure how familiar the image is.") from None
        assert job.features is not None
        return job.features
