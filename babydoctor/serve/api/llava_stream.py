"""LLaVA's stream: JSON messages, each followed by a NUL byte, whose ``text`` is the whole text so far.

Only this module handles the cumulative text; the rest of the package uses deltas. Source:
``llava/serve/model_worker.py`` of the original code, release 1.2. Fields besides ``text`` and ``error_code`` are ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from babydoctor.engine.request import TokenLogprob, Usage
from babydoctor.serve.api.errors import (
    ERROR_NO_WORKER,
    ERROR_NONE,
    ERROR_UNREACHABLE,
    OVERFLOW,
    ApiCode,
    ApiError,
    known_code,
    overflow_error,
)
from babydoctor.serve.api.protocol import CERTAINTY_NAMES
from babydoctor.serve.api.streaming import AnswerDelta

OVERFLOW_NOTICE = "Exceeds max token length. Please start a new conversation, thanks."
"""Sent with ``ERROR_NONE`` when the prompt leaves no room for an answer. This is the original's text."""

DELIMITER = b"\0"
"""Ends each message. JSON escapes NUL, so it never occurs inside one."""

MAX_MESSAGE_BYTES = 16 * 2**20
"""A worker that sends a longer message is broken."""

STREAM_TYPE = "application/octet-stream"

ERROR_HEADER = "x-babydoctor-error"
"""The error's code, for errors sent as a stream with HTTP 200. Saves a controller from reading the body."""

NO_TOKEN_ID = -1
"""Stands for the token id in log probabilities from a server that sends no ids."""

_CODE_OF_NUMBER: dict[int, ApiCode] = {ERROR_NO_WORKER: "no_worker", ERROR_UNREACHABLE: "worker_lost"}


class LlavaWriter:
    """Deltas -> messages.

    Args:
        front: the beginning of ``text``: the prompt, or nothing with ``echo: false``.
        token_ids: True if messages carry the ids of new tokens.
    """

    def __init__(self, front: str, *, token_ids: bool = False) -> None:
        self._text = front
        self._token_ids = token_ids

    def document(self, delta: AnswerDelta) -> dict[str, Any]:
        """The message for a delta without error."""
        self._text += delta.text
        data: dict[str, Any] = {"text": self._text, "error_code": ERROR_NONE}
        if delta.finish_reason is not None:
            data["finish_reason"] = delta.finish_reason
        if delta.usage is not None:
            data["usage"] = usage_document(delta.usage)
        if delta.logprobs:
            data["logprobs"] = [
                {"text": t.text, "logprob": t.logprob, "top": [(text, value) for _, text, value in t.top]}
                for t in delta.logprobs
            ]
        if self._token_ids and delta.token_ids:
            data["token_ids"] = delta.token_ids
        return data | dict(delta.certainty)

    def encode(self, delta: AnswerDelta | None) -> bytes:
        """The messages for one delta; None repeats the last text, the only keep-alive that LLaVA's clients know."""
        delta = delta or AnswerDelta()
        error = delta.error
        if error is None:
            return frame(self.document(delta))
        messages = frame(self.document(delta)) if delta.text else b""
        if error.code == OVERFLOW:
            notice = {"text": self._text + OVERFLOW_NOTICE, "error_code": ERROR_NONE, "finish_reason": "length"}
            return messages + frame(notice | {"code": OVERFLOW})
        return messages + frame({"text": error.message, "error_code": error.error_code, "code": error.code})


def usage_document(usage: Usage) -> dict[str, int]:
    """Token counts with OpenAI's field names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def frame(message: dict[str, Any]) -> bytes:
    """One message of a stream."""
    return json.dumps(message).encode() + DELIMITER


class LlavaReader:
    """Chunks of bytes -> deltas.

    Args:
        front: the beginning of ``text``, see ``LlavaWriter``.
        so_far: the part of this answer that another worker has already sent. It is not repeated.
    """

    def __init__(self, front: str = "", so_far: str = "") -> None:
        self._front = front
        self._buffer = bytearray()
        self.so_far = so_far

    def feed(self, data: bytes) -> Iterator[AnswerDelta]:
        """Yield a delta for each message that ``data`` completes; a keep-alive is an empty delta.

        Raises:
            ValueError: a message is longer than ``MAX_MESSAGE_BYTES``, or not JSON with a ``text``.
        """
        self._buffer += data
        while (end := self._buffer.find(DELIMITER)) >= 0:
            piece = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if piece:
                yield self._read(json.loads(piece))
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message is longer than {MAX_MESSAGE_BYTES} bytes")

    @property
    def pending(self) -> int:
        """Number of bytes of an incomplete message."""
        return len(self._buffer)

    def _read(self, message: Any) -> AnswerDelta:
        if not isinstance(message, dict) or not isinstance(message.get("text"), str):
            raise ValueError("a message is a JSON object with a 'text'")
        text: str = message["text"]
        number = int(message.get("error_code", ERROR_NONE))
        if number != ERROR_NONE:
            code = known_code(message.get("code"), _CODE_OF_NUMBER.get(number, "worker_failed"))
            return AnswerDelta(error=ApiError(code, text))
        if message.get("code") == OVERFLOW:
            return AnswerDelta(error=overflow_error())
        text = text.removeprefix(self._front)
        # A worker that continues a lost worker's answer sends it from the beginning.
        new, self.so_far = text[len(self.so_far) :], max(text, self.so_far, key=len)
        return AnswerDelta(
            new,
            message.get("finish_reason"),
            _usage(message.get("usage")),
            tuple(message.get("token_ids") or ()),
            tuple(_logprobs(message.get("logprobs"))),
            certainty={name: message[name] for name in CERTAINTY_NAMES if isinstance(message.get(name), dict)},
        )


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict) or not value.keys() >= {"prompt_tokens", "completion_tokens"}:
        return None
    return Usage(int(value["prompt_tokens"]), int(value["completion_tokens"]))


def _logprobs(value: Any) -> Iterator[TokenLogprob]:
    """Log probabilities of a BabyDoctor worker. FastChat's workers use another form, which is ignored."""
    for item in value if isinstance(value, list) else ():
        top = tuple((NO_TOKEN_ID, text, value) for text, value in item.get("top", ()))
        yield TokenLogprob(NO_TOKEN_ID, item["text"], item["logprob"], top)
