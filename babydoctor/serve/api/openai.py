"""OpenAI's chat completions in the words of our own wire, so that the ``openai`` client works unchanged.

Messages become a prompt by the run's template and a ``GenerateRequest``; chunks become completion objects. What
the server cannot do (tools, several answers, penalties) is refused by name, never ignored.
Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel, ConfigDict, Field

from babydoctor.conversation import Template, prompt_text, render_prompt
from babydoctor.schema import IMAGE_TOKEN, Turn, UserError
from babydoctor.serve.api.errors import ERROR_NONE, ApiError
from babydoctor.serve.api.protocol import MAX_NEW_TOKENS, Body, Chunk, GenerateRequest, Text, TokenLogprob
from babydoctor.serve.api.streaming import error_of

FetchImage = Callable[[str], Awaitable[bytes]]

MAX_MESSAGES = 256


class ImageUrl(Body):
    url: str = Field(description="`data:image/png;base64,...`; http(s) only where the operator allows the host.")
    detail: str | None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None


class StreamOptions(Body):
    include_usage: bool = False


class ChatRequest(Body):
    """Body of ``/v1/chat/completions``."""

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
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo..."}},
                            ],
                        }
                    ],
                    "max_tokens": 64,
                    "temperature": 0,
                }
            ]
        }
    )

    model: Text = Field(max_length=512)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Text | list[Text] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: int | None = Field(1, description="Only 1.")
    frequency_penalty: float | None = Field(0, description="Only 0.")
    presence_penalty: float | None = Field(0, description="Only 0.")
    logit_bias: dict[str, float] | None = Field(None, description="Not supported.")
    tools: list[Any] | None = Field(None, description="Not supported.")
    functions: list[Any] | None = Field(None, description="Not supported.")
    response_format: dict[str, Any] | None = Field(None, description='Only `{"type": "text"}`.')


def _refuse_unsupported(request: ChatRequest) -> None:
    unsupported = {
        "n": request.n not in (None, 1),
        "frequency_penalty": bool(request.frequency_penalty),
        "presence_penalty": bool(request.presence_penalty),
        "logit_bias": bool(request.logit_bias),
        "tools": bool(request.tools),
        "functions": bool(request.functions),
        "response_format": request.response_format not in (None, {"type": "text"}),
        "top_logprobs": bool(request.top_logprobs) and not request.logprobs,
    }
    for param, given in unsupported.items():
        if given:
            reason = "needs logprobs: true" if param == "top_logprobs" else "is not supported by this server"
            raise ApiError("unsupported", f"{param} {reason}; leave it out.", param=param)


async def to_generate(request: ChatRequest, template: Template, fetch: FetchImage) -> GenerateRequest:
    """Render the messages by the model's template.

    Args:
        fetch: downloads an image by URL, or refuses to.

    Raises:
        ApiError: 422, naming what cannot be served.
    """
    _refuse_unsupported(request)
    system, turns, urls = _to_turns(request.messages)
    if len(urls) > 1:
        raise ApiError(
            "too_many_images",
            f"The conversation has {len(urls)} images; this model reads one a conversation. Start a new conversation "
            "for the other image.",
            param="messages",
        )
    images = [await _to_base64(url, fetch) for url in urls]
    try:
        prompt = prompt_text(render_prompt(turns, template, system=system))
    except UserError as error:
        raise ApiError("bad_messages", f"{error}.", param="messages") from None
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > 16:
        raise ApiError("bad_request", f"stop has {len(stops)} strings; at most 16 are allowed.", param="stop")
    max_new_tokens = request.max_completion_tokens or request.max_tokens or MAX_NEW_TOKENS
    return GenerateRequest(
        model=request.model,
        prompt=prompt,
        images=images,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        max_new_tokens=max_new_tokens,
        stop=[*stops, template.stop],
        seed=None if request.seed is None else request.seed % 2**63,
        logprobs=(request.top_logprobs or 0) + 1 if request.logprobs else None,
    )


def _to_turns(messages: list[Message]) -> tuple[str | None, list[Turn], list[str]]:
    """Messages -> system prompt, turns and image URLs. Neighbouring messages of one role become one turn."""
    systems: list[str] = []
    turns: list[Turn] = []
    urls: list[str] = []
    for message in messages:
        text, images = _content(message)
        if message.role in ("system", "developer"):
            if images or turns:
                fault = "holds an image" if images else "comes after a user's message"
                raise ApiError("bad_messages", f"A system message {fault}.", param="messages")
            systems.append(text)
            continue
        if images and message.role == "assistant":
            raise ApiError("bad_messages", "An assistant's message holds an image.", param="messages")
        # The stages train with the image in front of the text, on a line of its own.
        text = f"{IMAGE_TOKEN}\n" * len(images) + text
        urls += images
        if turns and turns[-1].role == message.role:
            turns[-1] = Turn(turns[-1].role, f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn("user" if message.role == "user" else "assistant", text))
    return "\n".join(systems) if systems else None, turns, urls


def _content(message: Message) -> tuple[str, list[str]]:
    parts = message.content if isinstance(message.content, list) else []
    texts = (
        [message.content] if isinstance(message.content, str) else [p.text for p in parts if isinstance(p, TextPart)]
    )
    text = "\n".join(texts)
    if IMAGE_TOKEN in text:
        raise ApiError(
            "bad_messages",
            f"A message holds {IMAGE_TOKEN!r}, which stands for an image in prompts.",
            param="messages",
        )
    return text, [p.image_url.url for p in parts if isinstance(p, ImagePart)]


async def _to_base64(url: str, fetch: FetchImage) -> str:
    if url[:5].lower() != "data:":
        return base64.b64encode(await fetch(url)).decode()
    head, comma, data = url.partition(",")
    if not comma:
        raise ApiError("bad_data_url", "The image's data URL has no comma before its data.", param="messages")
    if head.lower().endswith(";base64"):
        return data
    return base64.b64encode(unquote_to_bytes(data)).decode()


class CompletionWriter:
    """Chunks -> completion objects of one request.

    Args:
        request_id: shows in the ``id``, so that a client's report can be found in the log.
    """

    def __init__(self, request: ChatRequest, request_id: str) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._model = request.model
        self._wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._wants_logprobs = bool(request.logprobs)
        self._num_top = request.top_logprobs or 0
        self._sent = ""
        self._begun = False

    def event(self, chunk: Chunk | None) -> bytes:
        """The server-sent events for one chunk; a comment for a moment of silence."""
        if chunk is None:
            return b": still working\n\n"
        if chunk.error_code != ERROR_NONE:
            return _event({"error": error_of(chunk).body()["error"]})
        delta: dict[str, Any] = {}
        if not self._begun:
            self._begun = True
            delta = {"role": "assistant", "content": ""}
        if new := chunk.text[len(self._sent) :]:
            delta["content"] = new
            self._sent = chunk.text
        events = b""
        if delta or chunk.logprobs:
            events += _event(self._part(delta, None, chunk.logprobs))
        if chunk.finish_reason is not None:
            events += _event(self._part({}, chunk.finish_reason, ()))
            if self._wants_usage and chunk.usage is not None:
                events += _event(
                    self._head("chat.completion.chunk") | {"choices": [], "usage": chunk.usage.model_dump()}
                )
        return events

    def document(self, chunk: Chunk) -> dict[str, Any]:
        """The completion for a whole answer."""
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": chunk.text, "refusal": None},
            "finish_reason": chunk.finish_reason or "stop",
            "logprobs": self._logprobs(chunk.logprobs),
        }
        usage = chunk.usage.model_dump() if chunk.usage is not None else None
        return self._head("chat.completion") | {"choices": [choice], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _part(
        self, delta: dict[str, Any], finish_reason: str | None, logprobs: tuple[TokenLogprob, ...]
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": self._logprobs(logprobs)}
        usage: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage

    def _logprobs(self, tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = [
            _logprob(t.text, t.logprob)
            | {"top_logprobs": [_logprob(text, value) for text, value in t.top[: self._num_top]]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def _event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class ModelCard(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "babydoctor"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
