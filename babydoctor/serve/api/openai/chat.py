"""OpenAI's chat completions: messages to a ``GenerateRequest``, deltas to completion objects.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, Field

from babydoctor.conversation import Template
from babydoctor.engine.request import TokenLogprob, Usage
from babydoctor.serve.api.certainty import CertaintyFields
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.openai.common import (
    ResponseFormat,
    SamplingBody,
    logprob_content,
    num_answers,
    refuse_unknown,
    schema_of,
    sse,
    sse_error,
    sse_silence,
    stop_strings,
    token_limit,
    total_usage,
    unsupported,
)
from babydoctor.serve.api.openai.messages import MAX_MESSAGES, FetchImage, Message, read_messages
from babydoctor.serve.api.protocol import Body, GenerateRequest, Text
from babydoctor.serve.api.streaming import AnswerDelta

EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAH0lEQVR42mMUYYAAJijNwMLAcIKBgcECIYLJYMTQBQA7"
    "4gE5OWSK5gAAAABJRU5ErkJggg=="
)
"""An image of 8 x 8 pixels, so that the example in the OpenAPI document can be sent unchanged."""


class StreamOptions(Body):
    include_usage: bool = False


class ChatRequest(SamplingBody, CertaintyFields):
    """Body of ``/v1/chat/completions``. If the last message is the assistant's, the answer continues it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "radiology",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "Which modality is this?"},
                                {"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE}},
                            ],
                        }
                    ],
                    "max_tokens": 64,
                    "temperature": 0,
                }
            ]
        }
    )

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Text | list[Text] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: int | None = Field(1, description="Number of answers to the same messages, 1 to 8.")
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = Field(
        None,
        description="From vLLM. False refuses a last message of the assistant instead of continuing it.",
    )


async def to_generate(request: ChatRequest, template: Template, fetch: FetchImage) -> list[GenerateRequest]:
    """Render the messages with the model's template; one request for each of the ``n`` answers.

    Args:
        fetch: downloads an image by URL, or refuses to.

    Raises:
        ApiError: a field is not supported or invalid; the message names it.
    """
    refuse_unknown(request)
    if request.top_logprobs and not request.logprobs:
        raise unsupported("top_logprobs", "needs logprobs: true")
    if request.agreement and num_answers(request.n) > 1:
        raise ApiError("bad_request", "agreement needs n = 1: it samples its own answers.", param="agreement")
    conversation = await read_messages(request.messages, fetch)
    if conversation.continues and request.continue_final_message is False:
        message = "The last message is the assistant's, and continue_final_message is false; end with the user's."
        raise ApiError("bad_messages", message, param="messages")
    if request.continue_final_message and not conversation.continues:
        message = "continue_final_message needs a last message of the assistant."
        raise ApiError("bad_messages", message, param="continue_final_message")
    common = conversation.generate_fields(template) | {
        "model": request.model,
        "max_new_tokens": token_limit(request.max_completion_tokens, request.max_tokens),
        "stop": stop_strings(request.stop, template.stop),
        "logprobs": (request.top_logprobs or 0) + 1 if request.logprobs else None,
        "json_schema": schema_of(request.response_format),
        **request.certainty_fields(),
    }
    return [GenerateRequest(**common, **request.sampling(index)) for index in range(num_answers(request.n))]


class ChatWriter:
    """Deltas -> completion objects of one request.

    Args:
        request_id: part of the ``id``, so that a client's report can be found in the log.
    """

    def __init__(self, request: ChatRequest, request_id: str) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._model = request.model
        self._wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._wants_logprobs = bool(request.logprobs)
        self._num_top = request.top_logprobs or 0
        self._num_answers = num_answers(request.n)
        self._usages: list[Usage | None] = []
        self._begun: set[int] = set()

    def event(self, delta: AnswerDelta | None) -> bytes:
        """The server-sent events for one delta."""
        if delta is None:
            return sse_silence()
        part: dict[str, Any] = {}
        if delta.index not in self._begun and delta.error is None:
            self._begun.add(delta.index)
            part = {"role": "assistant", "content": ""}
        if delta.text:
            part["content"] = delta.text
        events = b""
        if part or delta.logprobs:
            events += sse(self._chunk(delta.index, part, None, delta.logprobs))
        if delta.finish_reason is not None:
            events += sse(self._chunk(delta.index, {}, delta.finish_reason, (), delta.certainty))
            self._usages.append(delta.usage)
            if self._wants_usage and len(self._usages) == self._num_answers:
                last: dict[str, Any] = {"choices": [], "usage": total_usage(self._usages)}
                events += sse(self._head("chat.completion.chunk") | last)
        return events + sse_error(delta)

    def document(self, answers: Sequence[AnswerDelta]) -> dict[str, Any]:
        """The completion for whole answers."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": answer.finish_reason or "stop",
                "logprobs": self._logprobs(answer.logprobs),
                **answer.certainty,
            }
            for index, answer in enumerate(answers)
        ]
        usage = total_usage([answer.usage for answer in answers])
        return self._head("chat.completion") | {"choices": choices, "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self,
        index: int,
        part: dict[str, Any],
        finish_reason: str | None,
        logprobs: Sequence[TokenLogprob],
        certainty: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": part, "finish_reason": finish_reason, "logprobs": self._logprobs(logprobs)}
        choice |= certainty or {}
        usage: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": logprob_content(tokens, self._num_top), "refusal": None} if self._wants_logprobs else None
