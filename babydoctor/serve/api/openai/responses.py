"""OpenAI's Responses API without state: each request contains the whole conversation.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from babydoctor.conversation import Template
from babydoctor.engine.request import Usage
from babydoctor.serve.api.certainty import CertaintyFields
from babydoctor.serve.api.openai.common import (
    JsonSchemaFormat,
    ResponseFormat,
    SamplingBody,
    logprob_content,
    refuse_unknown,
    schema_of,
    sse,
    sse_silence,
    stop_strings,
    token_limit,
)
from babydoctor.serve.api.openai.messages import (
    MAX_MESSAGES,
    FetchImage,
    ImagePart,
    ImageUrl,
    Message,
    Part,
    TextPart,
    read_messages,
)
from babydoctor.serve.api.protocol import Body, GenerateRequest, Text
from babydoctor.serve.api.streaming import AnswerDelta


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: Text


class InputImage(Body):
    type: Literal["input_image"]
    image_url: str
    detail: str | None = None


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputMessage(Body):
    """A message, or an output item of an earlier response sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[InputPart]


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class TextSettings(Body):
    format: TextFormat | None = None


class ResponsesRequest(SamplingBody, CertaintyFields):
    """Body of ``/v1/responses``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "radiology", "input": "What can you tell about a chest radiograph?"}]}
    )

    input: Text | Annotated[list[InputMessage], Field(max_length=MAX_MESSAGES - 1)] = Field(
        description="A question, or the whole conversation."
    )
    instructions: Text | None = Field(None, description="System prompt.")
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextSettings | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


async def to_generate(request: ResponsesRequest, template: Template, fetch: FetchImage) -> list[GenerateRequest]:
    """Render the conversation with the model's template.

    Raises:
        ApiError: a field is not supported or invalid; the message names it.
    """
    refuse_unknown(request)
    messages = [Message(role="system", content=request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        messages.append(Message(role="user", content=request.input))
    else:
        messages += map(_message, request.input)
    conversation = await read_messages(messages, fetch)
    fields = conversation.generate_fields(template) | {
        "model": request.model,
        "max_new_tokens": token_limit(request.max_output_tokens),
        "stop": stop_strings(None, template.stop),
        "logprobs": request.top_logprobs + 1 if request.top_logprobs else None,
        "json_schema": schema_of(_response_format(request)),
        **request.certainty_fields(),
    }
    return [GenerateRequest(**fields, **request.sampling())]


def _message(item: InputMessage) -> Message:
    if isinstance(item.content, str):
        return Message(role=item.role, content=item.content)
    parts: list[Part] = [
        ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url))
        if isinstance(part, InputImage)
        else TextPart(type="text", text=part.text)
        for part in item.content
    ]
    return Message(role=item.role, content=parts)


def _response_format(request: ResponsesRequest) -> ResponseFormat | None:
    given = request.text.format if request.text is not None else None
    if given is None:
        return None
    schema = JsonSchemaFormat(name=given.name, schema=given.json_schema) if given.json_schema else None
    return ResponseFormat(type=given.type, json_schema=schema)


class ResponseWriter:
    """Deltas -> response objects and events of one request.

    Args:
        request_id: part of the ``id``, so that a client's report can be found in the log.
    """

    def __init__(self, request: ResponsesRequest, request_id: str) -> None:
        self._request = request
        self._id = f"resp_{request_id}"
        self._item_id = f"msg_{request_id}"
        self._created = int(time.time())
        self._answer = AnswerDelta()
        self._sequence = 0
        self._begun = False

    def event(self, delta: AnswerDelta | None) -> bytes:
        """The server-sent events for one delta."""
        if delta is None:
            return sse_silence()
        events = b""
        if not self._begun:
            self._begun = True
            events += self._opening()
        if delta.text:
            at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
            logprobs = self._logprobs(delta)
            events += self._event("response.output_text.delta", at | {"delta": delta.text, "logprobs": logprobs})
        self._answer = self._answer.then(delta)
        if delta.error is not None:
            error = {"code": "server_error", "message": delta.error.message}
            failed = self._response("failed", []) | {"error": error}
            return events + self._event("response.failed", {"response": failed})
        return events + self._closing() if delta.finish_reason is not None else events

    def document(self, answers: Sequence[AnswerDelta]) -> dict[str, Any]:
        """The response for a whole answer."""
        (self._answer,) = answers
        return self._finished()

    def _opening(self) -> bytes:
        empty = self._response("in_progress", [])
        item = self._item("in_progress") | {"content": []}
        at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return (
            self._event("response.created", {"response": empty})
            + self._event("response.in_progress", {"response": empty})
            + self._event("response.output_item.added", {"output_index": 0, "item": item})
            + self._event("response.content_part.added", at | {"part": part})
        )

    def _closing(self) -> bytes:
        response = self._finished()
        (item,) = response["output"]
        (part,) = item["content"]
        at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        done = at | {"text": part["text"], "logprobs": part["logprobs"]}
        return (
            self._event("response.output_text.done", done)
            + self._event("response.content_part.done", at | {"part": part})
            + self._event("response.output_item.done", {"output_index": 0, "item": item})
            + self._event(f"response.{response['status']}", {"response": response})
        )

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence} | fields
        self._sequence += 1
        return sse(data, kind)

    def _finished(self) -> dict[str, Any]:
        is_cut = self._answer.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        response = self._response(status, [self._item(status)])
        details = {"reason": "max_output_tokens"} if is_cut else None
        more = {"incomplete_details": details, "usage": _usage(self._answer.usage)}
        return response | more | dict(self._answer.certainty)

    def _item(self, status: str) -> dict[str, Any]:
        part = {
            "type": "output_text",
            "text": self._answer.text,
            "annotations": [],
            "logprobs": self._logprobs(self._answer),
        }
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": [part]}

    def _logprobs(self, delta: AnswerDelta) -> list[dict[str, Any]]:
        num_top = self._request.top_logprobs or 0
        return logprob_content(delta.logprobs, num_top) if num_top else []

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request = self._request
        text_format = request.text.format if request.text is not None else None
        shown = text_format.model_dump(by_alias=True, exclude_none=True) if text_format else {"type": "text"}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "model": request.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": shown},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
