"""OpenAI's completions: the prompt is used unchanged, without a template.

Source: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field

from babydoctor.engine.request import TokenLogprob, Usage
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.openai.chat import StreamOptions
from babydoctor.serve.api.openai.common import (
    MAX_ANSWERS,
    ResponseFormat,
    SamplingBody,
    num_answers,
    refuse_unknown,
    schema_of,
    sse,
    sse_error,
    sse_silence,
    stop_strings,
    total_usage,
)
from babydoctor.serve.api.protocol import GenerateRequest, Text
from babydoctor.serve.api.streaming import AnswerDelta

DEFAULT_TOKENS = 16
"""Default of ``max_tokens`` for completions at OpenAI."""


class CompletionRequest(SamplingBody):
    """Body of ``/v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "radiology", "prompt": "The chest radiograph shows", "max_tokens": 32}]
        }
    )

    prompt: Text | list[Text] = Field(description="Text, or several texts that are completed independently.")
    max_tokens: int | None = Field(None, ge=1, description="Default 16.")
    stop: Text | list[Text] | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, description="Number of answers to each prompt; at most 8 answers in total.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(False, description="Whether the text begins with the prompt.")
    response_format: ResponseFormat | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


def to_generate(request: CompletionRequest) -> list[GenerateRequest]:
    """One request for each answer: all of the first prompt, then all of the second.

    Raises:
        ApiError: a field is not supported or invalid; the message names it.
    """
    refuse_unknown(request)
    n = num_answers(request.n)
    num_prompts = len(request.prompts)
    if not 1 <= n * num_prompts <= MAX_ANSWERS:
        message = f"{num_prompts} prompts with n={n} are {n * num_prompts} answers; 1 to {MAX_ANSWERS} are allowed."
        raise ApiError("bad_request", message, param="prompt")
    common = {
        "model": request.model,
        "max_new_tokens": request.max_tokens or DEFAULT_TOKENS,
        "stop": stop_strings(request.stop),
        "logprobs": None if request.logprobs is None else request.logprobs + 1,
        "json_schema": schema_of(request.response_format),
        "continues": True,
    }
    return [
        GenerateRequest(prompt=prompt, **common, **request.sampling(index))
        for prompt in request.prompts
        for index in range(n)
    ]


class CompletionWriter:
    """Deltas -> completion objects of one request.

    Args:
        request_id: part of the ``id``, so that a client's report can be found in the log.
    """

    def __init__(self, request: CompletionRequest, request_id: str) -> None:
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._num_top = request.logprobs
        n = num_answers(request.n)
        self._fronts = [prompt if request.echo else "" for prompt in request.prompts for _ in range(n)]
        self._lengths = [len(front) for front in self._fronts]
        self._usages: list[Usage | None] = []
        self._begun: set[int] = set()

    def event(self, delta: AnswerDelta | None) -> bytes:
        """The server-sent events for one delta."""
        if delta is None:
            return sse_silence()
        text = delta.text
        if delta.index not in self._begun and delta.error is None:
            self._begun.add(delta.index)
            text = self._fronts[delta.index] + text
        events = b""
        if text or delta.logprobs or delta.finish_reason is not None:
            choice = self._choice(delta.index, text, delta.finish_reason, delta.logprobs)
            events += sse(self._head | {"choices": [choice]})
        if delta.finish_reason is not None:
            self._usages.append(delta.usage)
            if self._wants_usage and len(self._usages) == len(self._fronts):
                events += sse(self._head | {"choices": [], "usage": total_usage(self._usages)})
        return events + sse_error(delta)

    def document(self, answers: Sequence[AnswerDelta]) -> dict[str, Any]:
        """The completion for whole answers."""
        choices = [
            self._choice(index, self._fronts[index] + answer.text, answer.finish_reason or "stop", answer.logprobs)
            for index, answer in enumerate(answers)
        ]
        return self._head | {"choices": choices, "usage": total_usage([answer.usage for answer in answers])}

    def _choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        scores = None if self._num_top is None else self._scores(index, logprobs)
        return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": scores}

    def _scores(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text: value for _, text, value in token.top[: self._num_top]} for token in tokens],
            "text_offset": offsets,
        }
