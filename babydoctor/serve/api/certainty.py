"""Our extension to all APIs: ``familiarity``, ``confidence`` and ``agreement`` with an answer, on request.

A worker measures the first two while it answers. Agreement is measured here: the same request is answered
``agreement`` more times, sampled, and the texts are compared. The last delta of an answer carries the results. A
measure that was requested and failed is ``{"unavailable": REASON}``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from babydoctor.eval.certainty.agreement import MAX_SAMPLES, MIN_P, TEMPERATURE, measure_agreement
from babydoctor.serve.api.backend import Backend
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import CERTAINTY_NAMES, GenerateRequest
from babydoctor.serve.api.streaming import AnswerDelta, EndOfAnswer, Readable

PATIENCE_S = 10.0
"""How long the first sample waits for a free request slot."""

RETRY_S = 0.1


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
    """Start an answer, with the measures that the request asks for.

    Raises:
        ApiError: the request was refused.
    """
    wanted = [name for name in CERTAINTY_NAMES if getattr(request, name)]
    if not wanted:
        return await backend.open(request)
    samples = [_sample_of(request, number) for number in range(request.agreement or 0)]
    answer = await backend.open(request.model_copy(update={"agreement": None}))
    return CertainAnswer(backend, answer, samples, wanted)


def _sample_of(request: GenerateRequest, number: int) -> GenerateRequest:
    """The same question, drawn at random. The seed makes a repeated request give the same samples."""
    seed = ((request.seed or 0) + number + 1) % 2**63
    drawn = {"temperature": TEMPERATURE, "top_p": 1.0, "min_p": MIN_P, "seed": seed}
    plain = {"familiarity": False, "confidence": False, "agreement": None, "logprobs": None, "token_ids": False}
    return request.model_copy(update=drawn | plain)


class CertainAnswer:
    """An answer whose last delta waits for the samples and carries the results.

    The samples begin when the answer has ended, so they reuse its prompt. As many run at the same time as the backend
    takes; the others wait for their turn.

    Args:
        samples: requests of the samples.
        wanted: names of ``CERTAINTY_NAMES``.
    """

    def __init__(
        self, backend: Backend, answer: Readable, samples: Sequence[GenerateRequest], wanted: Sequence[str]
    ) -> None:
        self._backend = backend
        self._answer = answer
        self._requests = samples
        self._wanted = wanted
        self._text = ""
        self._last: AnswerDelta | None = None
        self._sampling: asyncio.Task[list[str]] | None = None
        self._is_done = False

    async def next(self, timeout_s: float) -> AnswerDelta | None:
        """The next delta; None if none came in time.

        Raises:
            EndOfAnswer: everything has been read.
        """
        if self._is_done:
            raise EndOfAnswer
        if self._sampling is not None:
            await asyncio.wait({self._sampling}, timeout=timeout_s)
            return self._finish() if self._sampling.done() else None
        delta = await self._answer.next(timeout_s)
        if delta is None:
            return None
        self._text += delta.text
        if delta.finish_reason is None:
            return delta
        # The end is held back until the samples have ended. All other fields are passed on at once.
        self._last = dataclasses.replace(delta, text="", token_ids=(), logprobs=())
        self._sampling = asyncio.ensure_future(self._sample())
        return dataclasses.replace(delta, finish_reason=None, usage=None, certainty={})

    async def aclose(self) -> None:
        """Stop the work for it. May be called more than once."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        await self._answer.aclose()

    async def _sample(self) -> list[str]:
        """The texts of all samples, in the order of their seeds.

        Raises:
            ApiError: a sample was refused or failed.
        """
        opened: list[Readable] = []
        started: list[asyncio.Task[str]] = []
        running: set[asyncio.Task[str]] = set()
        patience = time.monotonic() + PATIENCE_S
        try:
            while len(started) < len(self._requests) or running:
                try:
                    for request in self._requests[len(started) :]:
                        opened.append(await self._backend.open(request))
                        started.append(asyncio.ensure_future(_read(opened[-1])))
                        running.add(started[-1])
                except ApiError as error:
                    if error.code != "queue_full" or not (running or time.monotonic() < patience):
                        raise
                if not running:
                    await asyncio.sleep(RETRY_S)
                    continue
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.gather(*done)  # one that failed ends the others
            return [task.result() for task in started]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            # A task that is canceled before it begins closes nothing itself.
            await asyncio.gather(*(answer.aclose() for answer in opened))

    def _finish(self) -> AnswerDelta:
        self._is_done = True
        assert self._last is not None and self._sampling is not None
        found: dict[str, Mapping[str, Any]] = dict(self._last.certainty)
        failure = self._sampling.exception()
        if isinstance(failure, ApiError):
            found["agreement"] = unavailable(f"A sampled answer failed: {failure.message}")
        elif failure is not None:
            raise failure
        elif self._requests:
            found["agreement"] = measure_agreement(self._text, self._sampling.result())
        missing = unavailable("The server that holds this model cannot measure it.")
        return dataclasses.replace(self._last, certainty={name: found.get(name, missing) for name in self._wanted})


async def _read(answer: Readable) -> str:
    """The text of a whole answer.

    Raises:
        ApiError: it broke off.
    """
    text = ""
    try:
        while True:
            delta = await answer.next(3600)
            if delta is not None:
                text += delta.text
                if delta.error is not None:
                    raise delta.error
    except EndOfAnswer:
        return text
    finally:
        await answer.aclose()


def unavailable(reason: str) -> dict[str, str]:
    """The value of a measure that failed."""
    return {"unavailable": reason}
