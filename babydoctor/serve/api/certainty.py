"""Our extension to all APIs: ``familiarity``, ``confidence`` and ``agreement`` beside an answer, on request.

A worker measures the first two while it answers. Agreement is measured here: the same request is answered
``agreement`` more times, sampled, and the texts are compared. The last delta of an answer carries the results; what was
asked for and could not be measured says why, as ``{"unavailable": REASON}``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from babydoctor.eval.certainty.agreement import MAX_SAMPLES, MIN_P, TEMPERATURE, measure_agreement
from babydoctor.serve.api.backend import Backend
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import CERTAINTY_NAMES, GenerateRequest
from babydoctor.serve.api.streaming import AnswerDelta, EndOfAnswer, Readable, open_all


class CertaintyFields(BaseModel):
    """Optional fields of the bodies of OpenAI's APIs."""

    familiarity: bool | None = Field(
        None, description="BabyDoctor: say whether the image is like those that the model was trained on."
    )
    confidence: bool | None = Field(
        None, description="BabyDoctor: the calibrated probability that a short answer is right."
    )
    agreement: int | None = Field(
        None,
        ge=2,
        le=MAX_SAMPLES,
        description="BabyDoctor: sample this many more answers and say how many of them are the same.",
    )

    def certainty_fields(self) -> dict[str, Any]:
        """The fields of ``GenerateRequest``."""
        return {
            "familiarity": bool(self.familiarity),
            "confidence": bool(self.confidence),
            "agreement": self.agreement,
        }


async def open_answer(backend: Backend, request: GenerateRequest) -> Readable:
    """Start an answer, with everything that the request asks beside it.

    Raises:
        ApiError: the request was refused.
    """
    wanted = [name for name in CERTAINTY_NAMES if getattr(request, name)]
    if not wanted:
        return await backend.open(request)
    first = request.model_copy(update={"agreement": None})
    samples = [_sample_of(first, number) for number in range(request.agreement or 0)]
    answers = await open_all([backend.open(each) for each in (first, *samples)])
    return CertainAnswer(answers, len(samples), wanted)


def _sample_of(request: GenerateRequest, number: int) -> GenerateRequest:
    """The same question, drawn at random. The seed makes a repeated request give the same samples."""
    drawn = {
        "temperature": TEMPERATURE,
        "top_p": 1.0,
        "min_p": MIN_P,
        "seed": ((request.seed or 0) + number + 1) % 2**63,
    }
    plain = {"familiarity": False, "confidence": False, "logprobs": None, "token_ids": False}
    return request.model_copy(update=drawn | plain)


class CertainAnswer:
    """An answer whose last delta waits for the samples and carries the results.

    Args:
        answers: the answer, and the samples with an ``index`` from 1 on.
        wanted: names of ``CERTAINTY_NAMES``.
    """

    def __init__(self, answers: Readable, num_samples: int, wanted: Sequence[str]) -> None:
        self._answers = answers
        self._wanted = wanted
        self._text = ""
        self._samples = [""] * num_samples
        self._failure: ApiError | None = None
        self._last: AnswerDelta | None = None
        self._is_done = False

    async def next(self, timeout_s: float) -> AnswerDelta | None:
        """The next delta; None if none came in time.

        Raises:
            EndOfAnswer: everything has been read.
        """
        if self._is_done:
            raise EndOfAnswer
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                delta = await self._answers.next(max(0.0, deadline - time.monotonic()))
            except EndOfAnswer:
                return self._finish()
            if delta is None:
                return None
            if delta.index == 0:
                break
            self._samples[delta.index - 1] += delta.text
            self._failure = self._failure or delta.error
        self._text += delta.text
        if delta.finish_reason is None:
            return delta
        # Held back until the samples have ended; its text is shown at once.
        self._last = dataclasses.replace(delta, text="", token_ids=(), logprobs=())
        return dataclasses.replace(delta, finish_reason=None, usage=None, certainty={})

    async def aclose(self) -> None:
        """Stop the work for it. May be called more than once."""
        await self._answers.aclose()

    def _finish(self) -> AnswerDelta:
        self._is_done = True
        if self._last is None:  # it ended with an error, which was passed on
            raise EndOfAnswer
        found: dict[str, Mapping[str, Any]] = dict(self._last.certainty)
        if self._failure is not None:
            found["agreement"] = unavailable(f"A sampled answer failed: {self._failure.message}")
        elif self._samples:
            found["agreement"] = measure_agreement(self._text, self._samples)
        missing = unavailable("The server that holds this model cannot measure it.")
        return dataclasses.replace(self._last, certainty={name: found.get(name, missing) for name in self._wanted})


def unavailable(reason: str) -> dict[str, str]:
    """In place of a result."""
    return {"unavailable": reason}
