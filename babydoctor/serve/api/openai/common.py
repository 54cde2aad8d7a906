"""Shared by OpenAI's three APIs: sampling fields, refusal of unsupported fields, events.

Source: https://platform.openai.com/docs/api-reference. Field names beyond OpenAI's are vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from babydoctor.engine.request import TokenLogprob, Usage
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import MAX_NEW_TOKENS, Text
from babydoctor.serve.api.shape_errors import MAX_SHOWN_CHARS
from babydoctor.serve.api.streaming import AnswerDelta

MAX_ANSWERS = 8
MAX_STOPS = 16

DONE = b"data: [DONE]\n\n"

WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Fields that are accepted and ignored. They concern OpenAI's own service."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "truncation": ("disabled",),
    "length_penalty": (1, 1.0),
    "include_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "include": ([], ["reasoning.encrypted_content"]),
}
"""Values with which unsupported fields have no effect."""


class SamplingBody(BaseModel):
    """Sampling fields of all three APIs. Unknown fields are refused by ``refuse_unknown``."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Text = Field(max_length=512, description="A name from `/v1/models`.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="Default 1.")
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = False
    top_k: int | None = Field(None, ge=-1, description="From vLLM: sample from this many most likely tokens.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="From vLLM: smallest probability, relative to that of the most likely token."
    )
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="vLLM's; 1: off.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    ignore_eos: bool | None = Field(None, description="From vLLM: generate past the end-of-text token.")

    def sampling(self, answer_index: int = 0) -> dict[str, Any]:
        """The fields of ``protocol.Sampling``. Each of several answers gets its own seed."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
        values = {name: getattr(self, name) for name in (*names, "temperature", "ignore_eos")}
        if self.seed is not None:
            values["seed"] = (self.seed + answer_index) % 2**63
        return {name: value for name, value in values.items() if value is not None}


def refuse_unknown(body: BaseModel) -> None:
    """Refuse unknown fields whose values would have an effect.

    Raises:
        ApiError: a field is not supported; the message names it.
    """
    for name, value in (body.model_extra or {}).items():
        asks_nothing = value is None or value is False or value in ("", [], {}) or value in _NEUTRAL.get(name, ())
        if name not in WITHOUT_EFFECT and not asks_nothing:
            short = name[:MAX_SHOWN_CHARS]
            raise unsupported(short if short.isidentifier() else f"the field {json.dumps(short)}")


def unsupported(param: str, reason: str = "is not supported by this server") -> ApiError:
    return ApiError("unsupported", f"{param} {reason}; leave it out.", param=param)


def num_answers(n: int | None) -> int:
    """The number of answers that a request asks for.

    Raises:
        ApiError: more than ``MAX_ANSWERS``.
    """
    if n is not None and not 1 <= n <= MAX_ANSWERS:
        raise ApiError("bad_request", f"n is {n}; it must be from 1 to {MAX_ANSWERS}.", param="n")
    return n or 1


def stop_strings(stop: str | list[str] | None, own: str | None = None) -> list[str]:
    """The client's stop strings and the template's ``own``.

    Raises:
        ApiError: more than ``MAX_STOPS``.
    """
    given = [stop] if isinstance(stop, str) else stop or []
    if len(given) > MAX_STOPS:
        message = f"stop has {len(given)} strings; at most {MAX_STOPS} are allowed."
        raise ApiError("bad_request", message, param="stop")
    return [*given, *([own] if own else [])]


def token_limit(*limits: int | None) -> int:
    """The first limit that is given, else the most that the server generates."""
    return next((limit for limit in limits if limit), MAX_NEW_TOKENS)


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    name: str = "answer"
    # The field is called "schema", which pydantic reserves.
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The format of the answer. JSON is enforced by constrained decoding."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


def schema_of(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema that the answer must match; None: free text.

    Raises:
        ApiError: ``json_schema`` without a schema.
    """
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {"type": "object"}
    if response_format.json_schema is None or response_format.json_schema.json_schema is None:
        message = "response_format of type json_schema needs json_schema.schema."
        raise ApiError("bad_request", message, param="response_format")
    return response_format.json_schema.json_schema


def total_usage(usages: Sequence[Usage | None]) -> dict[str, Any] | None:
    """Token counts of all answers to a request; the prompt counts once."""
    known = [usage for usage in usages if usage is not None]
    if not known:
        return None
    prompt, completion = known[0].prompt_tokens, sum(usage.completion_tokens for usage in known)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def logprob_content(tokens: Sequence[TokenLogprob], num_top: int) -> list[dict[str, Any]]:
    """Log probabilities in the form of chat completions."""
    return [
        _logprob(t.text, t.logprob) | {"top_logprobs": [_logprob(text, value) for _, text, value in t.top[:num_top]]}
        for t in tokens
    ]


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + json.dumps(data).encode() + b"\n\n"


def sse_silence() -> bytes:
    """A comment that tells proxies and clients that the stream is alive."""
    return b": still working\n\n"


def sse_error(delta: AnswerDelta) -> bytes:
    """The event for the error that ends a stream; empty without an error."""
    return sse({"error": delta.error.body()["error"]}) if delta.error is not None else b""
