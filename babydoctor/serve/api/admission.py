"""Check a request before any work is done: keys, request slots, base64 of images, shape of JSON. Free of torch.

The checks are cheap, so a server under load can still refuse requests.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from babydoctor.schema import IMAGE_TOKEN
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import GenerateRequest
from babydoctor.serve.api.shape_errors import Path, field_name
from babydoctor.serve.settings import Limits

MAX_JSON_DEPTH = 32
"""Valid requests nest 6 levels deep. Very deep ones could exhaust the parser's stack."""

MAX_JSON_MARKS = 50_000
"""Limit of strings, brackets and commas. A long chat has a few thousand; millions would take too long to parse."""

_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_STANDARD_ALPHABET = str.maketrans("-_", "+/")
"""Translates the URL-safe alphabet of base64."""


class Keys:
    """A set of API keys. A comparison takes the same time however much of a key matches."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Hashes have the same length, so timing does not reveal the length of a key either.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: str) -> bool:
        """True if ``key`` is one of the keys."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:  # no early exit
            found |= hmac.compare_digest(known, digest)
        return found


def bearer_key(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The key in ``Authorization: Bearer KEY`` or ``X-API-Key``; empty if both headers are missing."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip().decode("latin-1")
        if name == b"x-api-key":
            return value.strip().decode("latin-1")
    return ""


class RequestSlots:
    """The request slots of a worker, for running and waiting requests. Further requests are refused at once.

    Args:
        num_slots: requests that run at the same time.
        max_queue: further requests that may wait.
    """

    def __init__(self, num_slots: int, max_queue: int) -> None:
        self.num_slots = num_slots
        self.max_queue = max_queue
        self.taken = 0
        self._mean_s = 2.0

    @property
    def capacity(self) -> int:
        return self.num_slots + self.max_queue

    def take(self) -> None:
        """Take a slot. The caller must return it with ``free``.

        Raises:
            ApiError: 429 with the time after which a slot is likely to be free.
        """
        if self.taken >= self.capacity:
            raise ApiError(
                "queue_full",
                f"The model is busy: {self.num_slots} requests run and {self.max_queue} wait. Please try again soon.",
                retry_after_s=self.retry_after_s(),
            )
        self.taken += 1

    def free(self, duration_s: float) -> None:
        assert self.taken > 0, self.taken
        self.taken -= 1
        self._mean_s += 0.1 * (duration_s - self._mean_s)

    def retry_after_s(self) -> int:
        """Seconds until half of the queue is likely to be answered, from 1 to 60."""
        return min(60, max(1, math.ceil(self._mean_s * (1 + self.max_queue / (2 * self.num_slots)))))


def decode_image(text: str, index: int) -> bytes:
    """Base64 (line breaks allowed), bare or as a data URL -> bytes.

    Raises:
        ApiError: it is not base64.
    """
    param = f"images[{index}]"
    text = re.sub(r"\s+", "", text)
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ApiError("bad_data_url", f"{param} is a data URL without base64 data.", param=param)
        text = re.sub(r"\s+", "", unquote(text))
    text = text.translate(_STANDARD_ALPHABET)
    text += "=" * (-len(text) % 4)  # as the URL standard's forgiving decoding does
    if not text or not _BASE64.fullmatch(text):
        raise ApiError("bad_base64", f"{param} is not base64.", param=param)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ApiError("bad_base64", f"{param} is not base64: {error}.", param=param) from None


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """Check a request as far as possible without decoding or tokenizing.

    Raises:
        ApiError: 413 or 422, naming the field and the limit.
    """
    if len(request.prompt) > limits.max_prompt_chars:
        raise ApiError(
            "prompt_too_long",
            f"The prompt has {len(request.prompt)} characters; the limit is {limits.max_prompt_chars}.",
            param="prompt",
        )
    marked = request.prompt
    if request.turns:  # in an answer, the marker is plain text
        marked = "".join(turn.text for turn in request.turns if turn.role == "user")
    check_image_count(marked, request.images or (), limits)


def check_image_count(prompt: str, images: Sequence[str], limits: Limits) -> None:
    """Check that images and ``<image>`` markers are equal in number, and within the limit.

    Raises:
        ApiError: 422.
    """
    num_marks = prompt.count(IMAGE_TOKEN)
    if len(images) != num_marks:
        raise ApiError(
            "wrong_image_count",
            f"The prompt has {num_marks} {IMAGE_TOKEN}, but the request has {len(images)} image(s).",
            param="images",
        )
    if len(images) > limits.max_images:
        raise ApiError(
            "too_many_images",
            f"The request has {len(images)} images; this server takes {limits.max_images} per conversation.",
            param="images",
        )


# Matches whole strings, so that brackets inside them do not count and the regex engine skips them in C.
# An unterminated string matches up to the end of the body. Otherwise the search would start again at each quote in it.
_STRING_OR_MARK = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{},]', re.S)


def check_json_shape(body: bytes) -> None:
    """Refuse bodies that nest too deeply or hold too many values, before they are parsed. Linear in time.

    Raises:
        ApiError: 422.
    """
    depth = 0
    for num_marks, match in enumerate(_STRING_OR_MARK.finditer(body), 1):
        mark = body[match.start()]
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if depth > MAX_JSON_DEPTH:
            raise ApiError("json_too_deep", f"The body nests more than {MAX_JSON_DEPTH} levels deep.")
        if num_marks > MAX_JSON_MARKS:
            raise ApiError("json_too_large", f"The body holds more than {MAX_JSON_MARKS} values and brackets.")


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_json_text(body: bytes) -> None:
    """Refuse half surrogate pairs, in keys too: ``"\\ud800"`` is valid JSON, but not valid Unicode. Linear in time.

    Raises:
        ApiError: a text holds half a surrogate pair; the message names its field.
    """
    if not _SURROGATE.search(body):
        return
    try:
        value = json.loads(body)
    except ValueError:  # reported when the body is parsed for the route
        return
    path = _path_of_surrogate(value)
    if path is not None:
        name = field_name(path)
        message = f"{name or 'The body'} must be valid Unicode, without half surrogate pairs."
        raise ApiError("bad_request", message, param=name or None)


def _path_of_surrogate(value: Any, path: Path = ()) -> Path | None:
    """The path of a text in a JSON value that UTF-8 cannot encode; for a key, the path of its object."""
    if isinstance(value, str):
        return path if any("\ud800" <= char <= "\udfff" for char in value) else None
    if isinstance(value, dict):
        if any(_path_of_surrogate(key) is not None for key in value):
            return path
        items: Any = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else ()
    found = (_path_of_surrogate(item, (*path, key)) for key, item in items)
    return next((inner for inner in found if inner is not None), None)
