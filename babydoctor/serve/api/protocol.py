"""What travels between clients, controller and workers: request bodies, stream framing, errors. No torch, no HTTP.

The LLaVA wire is kept as it is (``llava/serve/{controller,model_worker}.py``, release 1.2); what ours adds are further
optional fields and endpoints, which the original's programs ignore.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from babydoctor.serve.api.errors import ERROR_NONE, ApiError

OVERFLOW_NOTICE = "Exceeds max token length. Please start a new conversation, thanks."
"""Sent with ``ERROR_NONE`` when the prompt leaves no room for an answer, word for word as the original does."""

GREEDY_TEMPERATURE = 0.001
"""At or below this temperature decoding is greedy."""

MAX_NEW_TOKENS = 1024
"""The wire's cap on ``max_new_tokens``; larger values are cut to it, as in the original."""

DELIMITER = b"\0"
"""Ends each chunk of a stream. JSON escapes NUL, so it never stands inside one."""

MAX_CHUNK_BYTES = 16 * 2**20
"""A longer chunk from a worker is a broken worker."""


def check_text(text: str) -> str:
    """Refuse what is not text: half surrogate pairs (``"\\ud800"`` is legal JSON) and NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without half surrogate pairs") from None
    if "\0" in text:
        raise ValueError("must not hold the NUL character")
    return text


Text = Annotated[str, AfterValidator(check_text)]


class Body(BaseModel):
    """Fields that a client sends and we do not know are ignored, as the original ignores them."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class GenerateRequest(Body):
    """Body of ``/worker_generate_stream`` and ``/worker_generate``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "radiology",
                    "prompt": "[INST] Which modality is this? [/INST]",
                    "temperature": 0,
                    "max_new_tokens": 64,
                    "stop": "</s>",
                }
            ]
        }
    )

    model: Text = Field("", max_length=512, description="A name from `/list_models`; a worker also takes none.")
    prompt: Text = Field(description="The whole prompt in the model's template, `<image>` where an image stands.")
    temperature: float = Field(1.0, allow_inf_nan=False, description="0.001 and below: greedy.")
    top_p: float = Field(1.0, ge=0, le=1)
    max_new_tokens: int = Field(256, ge=1, description="At most 1024; more is cut to that.")
    stop: Text | list[Text] | None = Field(None, description="The answer ends before any of these.")
    images: list[str] | None = Field(None, max_length=64, description="Bare base64, one for each `<image>`.")
    echo: bool = Field(True, description="Whether `text` begins with the prompt.")
    seed: int | None = Field(None, ge=0, lt=2**63)
    logprobs: bool | int | None = Field(None, description="True or 1: log-probabilities of the chosen tokens.")
    token_ids: bool = Field(False, description="Whether chunks carry the ids of the new tokens.")
    resume_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None,
        max_length=MAX_NEW_TOKENS,
        description="Tokens that another worker has generated already; the answer goes on after them.",
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings that are not empty."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(text for text in given if text))

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_TEMPERATURE


class AttentionRequest(Body):
    """Body of ``/worker_attention``: where on the image each word of an answer looked."""

    model: Text = Field("", max_length=512)
    prompt: Text = Field(description="The prompt that was answered, `<image>` where the image stands.")
    answer: Text = Field(min_length=1, max_length=16_384, description="The answer, as it was received.")
    images: list[str] = Field(max_length=64, description="Bare base64, one for each `<image>`.")


class TokenAttention(BaseModel):
    text: str = Field(description="The piece of the answer; all pieces together are the answer.")
    weights: list[float] = Field(description="Share of attention that went to each image patch, row by row.")


class AttentionReply(BaseModel):
    grid: list[int] = Field(description="Rows and columns of image patches.")
    tokens: list[TokenAttention]


class CountTokenRequest(Body):
    """Body of ``/count_token``."""

    model: Text = Field("", max_length=512)
    prompt: Text


class ModelRequest(Body):
    """Body of ``/get_worker_address`` and of FastChat's endpoints that need only a model's name."""

    model: Text = Field("", max_length=512)


class WorkerStatus(Body):
    """What a worker says of itself. ``template`` and ``grid`` are ours; the original's workers send none."""

    model_names: list[Annotated[Text, Field(min_length=1, max_length=512)]] = Field(min_length=1, max_length=64)
    speed: float = Field(1, gt=0, le=1e6, description="Relative speed, for the lottery.")
    queue_length: int = Field(0, ge=0, le=10**9, description="Requests running and waiting.")
    template: str | None = Field(None, max_length=64, description="Name of the conversation template.")
    draining: bool = Field(False, description="True once the worker takes nothing new.")


class FleetStatus(BaseModel):
    """A controller's answer to ``/worker_get_status``: its workers taken together."""

    model_names: list[str]
    speed: float
    queue_length: int


class RegisterRequest(Body):
    """Body of ``/register_worker``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "worker_name": "http://127.0.0.1:21002",
                    "check_heart_beat": True,
                    "worker_status": {"model_names": ["radiology"], "speed": 1, "queue_length": 0},
                }
            ]
        }
    )

    worker_name: str = Field(max_length=2048, description="The URL under which the controller reaches the worker.")
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None


class HeartBeat(Body):
    """Body of ``/receive_heart_beat``."""

    worker_name: str = Field(max_length=2048)
    queue_length: int = Field(ge=0, le=10**9)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token with its log-probability and, on demand, the likeliest alternatives."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of a stream. ``text`` is everything so far; the other fields are beside LLaVA's wire.

    ``token_ids`` and ``logprobs`` are those that are new since the chunk before. The last chunk has a
    ``finish_reason`` (``stop``, ``length``) or an ``error_code``.
    """

    text: str
    error_code: int = ERROR_NONE
    finish_reason: str | None = None
    usage: Usage | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    code: str | None = None
    """Machine name of the error, see ``ApiError``."""

    def with_text(self, text: str) -> Chunk:
        return Chunk(text, self.error_code, self.finish_reason, self.usage, self.token_ids, self.logprobs, self.code)

    def to_json(self, *, token_ids: bool = False) -> dict[str, Any]:
        data: dict[str, Any] = {"text": self.text, "error_code": self.error_code}
        if self.finish_reason is not None:
            data["finish_reason"] = self.finish_reason
        if self.usage is not None:
            data["usage"] = self.usage.model_dump()
        if self.logprobs:
            data["logprobs"] = [{"text": t.text, "logprob": t.logprob, "top": t.top} for t in self.logprobs]
        if token_ids and self.token_ids:
            data["token_ids"] = self.token_ids
        if self.code is not None:
            data["code"] = self.code
        return data

    @classmethod
    def of_error(cls, error: ApiError) -> Chunk:
        return cls(error.message, error.error_code, code=error.code)


def encode_chunk(chunk: Chunk, *, token_ids: bool = False) -> bytes:
    """One chunk as it goes over the wire: JSON and a NUL byte."""
    return json.dumps(chunk.to_json(token_ids=token_ids)).encode() + DELIMITER


def decode_chunk(data: bytes) -> Chunk:
    """Read one chunk, ours or the original's.

    Raises:
        ValueError: it is not a JSON object with a ``text`` and an ``error_code``.
    """
    values = json.loads(data)
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise ValueError("a chunk is a JSON object with a 'text'")
    usage = values.get("usage")
    return Chunk(
        text=values["text"],
        error_code=int(values.get("error_code", ERROR_NONE)),
        finish_reason=values.get("finish_reason"),
        usage=Usage(**usage) if isinstance(usage, dict) and usage.keys() >= Usage.model_fields.keys() else None,
        token_ids=tuple(values.get("token_ids") or ()),
        logprobs=tuple(
            TokenLogprob(t["text"], t["logprob"], tuple((text, value) for text, value in t.get("top", ())))
            for t in _list(values.get("logprobs"))
        ),
        code=values.get("code"),
    )


def _list(value: Any) -> list[dict[str, Any]]:
    """FastChat's workers send ``logprobs`` as an object of another form; only ours are read."""
    return value if isinstance(value, list) else []


class StreamDecoder:
    """Cut a byte stream into chunks; bytes come in any portions."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """Yield each chunk that ``data`` completes.

        Raises:
            ValueError: a chunk is longer than ``MAX_CHUNK_BYTES`` or not JSON.
        """
        self._buffer += data
        while (end := self._buffer.find(DELIMITER)) >= 0:
            piece = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if piece:
                yield decode_chunk(piece)
        if len(self._buffer) > MAX_CHUNK_BYTES:
            raise ValueError(f"a chunk is longer than {MAX_CHUNK_BYTES} bytes")

    @property
    def pending(self) -> int:
        """Bytes of a chunk that has not ended."""
        return len(self._buffer)
