"""Describe a request body of the wrong shape in one sentence: the field, what was sent, and what to send instead.

pydantic reports one error for each branch of a union, in terms of Python types. Here the errors of a field are merged,
and the most specific field is reported: for ``content: str | list`` with a bad item in the list, that is the item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from babydoctor.serve.api.errors import ApiError

MAX_SHOWN_CHARS = 40
"""Messages quote at most this much of a client's text, which may be a whole prompt or image."""

Path = tuple[int | str, ...]

_EXPECTED: Mapping[str, str] = {
    "string_type": "a string",
    "string_unicode": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer of fewer digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
"""What a field must be, by pydantic's error type."""

_CONTAINERS = ("a string", "a list", "an object")

_WITH_LIMIT: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than_equal": lambda limit: f"at least {_number(limit['ge'])}",
    "greater_than": lambda limit: f"greater than {_number(limit['gt'])}",
    "less_than_equal": lambda limit: f"at most {_number(limit['le'])}",
    "less_than": lambda limit: f"less than {_number(limit['lt'])}",
    "literal_error": lambda limit: re.sub(r"'([^']*)'", r'"\1"', limit["expected"]),
    "union_tag_invalid": lambda limit: _last_with_or(limit["expected_tags"].replace("'", '"')),
}

_LENGTHS: Mapping[str, tuple[str, str]] = {
    "too_long": ("max_length", "at most"),
    "too_short": ("min_length", "at least"),
    "string_too_long": ("max_length", "at most"),
    "string_too_short": ("min_length", "at least"),
}


def shape_error(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Convert pydantic's ``errors`` about ``body`` to an API error. Their locations begin with ``"body"``."""
    if isinstance(body, bytes):  # FastAPI does not parse a body of another content type
        return ApiError("bad_request", "The body must be JSON with the header Content-Type: application/json.")
    located = [(_locate(body, error), error) for error in errors]
    first = located[0][0]
    inside = [path for path, _ in located if path[: len(first)] == first]
    path = max(inside, key=len)
    # Prefer errors of the branch whose type matched, because the client meant that branch.
    faults = sorted((error for other, error in located if other == path), key=lambda e: e["type"] in _EXPECTED)
    name = field_name(path)
    return ApiError("bad_request", _sentence(name, faults), param=name or None)


def field_name(path: Path) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``. Long keys of the client are cut."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{_cut(part)}"
    return name.removeprefix(".")


def describe(value: Any, *, quotes: bool = False) -> str:
    """Describe a client's value in a few printable words.

    Without ``quotes``, text is not repeated, because a patient's name may be in the wrong field.
    """
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the string {json.dumps(_cut(value))}" if quotes else "a string"
    return "null" if value is None else _cut(json.dumps(value, default=str))


def _sentence(name: str, faults: Sequence[Mapping[str, Any]]) -> str:
    fault, field = faults[0], name or "The body"
    kind, limit, value = fault["type"], fault.get("ctx") or {}, fault.get("input")
    if kind in ("missing", "union_tag_not_found"):
        if not name:
            return "The body is empty; send a JSON object."
        return f"{field} is missing; add it to the request."
    if kind == "value_error":
        return f"{field} {limit['error']}."
    if kind in _LENGTHS:
        bound, how = _LENGTHS[kind]
        unit = "characters" if isinstance(value, str) else "items"
        num = len(value) if isinstance(value, str | list | dict) else limit.get("actual_length")
        return f"{field} has {num} {unit}; send {how} {limit[bound]}."
    expected = list(
        dict.fromkeys(_expectation(error) for error in faults if fault["type"] in _EXPECTED or error is fault)
    )
    if kind == "union_tag_invalid":
        value = limit["tag"]
    if fault["loc"][-1] == "[key]":
        field = f"Each key of {field}"
    # These fields expect a number or a name from a list, never free text.
    quotes = not any(word in _CONTAINERS for word in expected)
    return f"{field} must be {' or '.join(expected)}, not {describe(value, quotes=quotes)}."


def _last_with_or(listed: str) -> str:
    return " or ".join(listed.rsplit(", ", 1))


def _expectation(error: Mapping[str, Any]) -> str:
    kind, limit = error["type"], error.get("ctx") or {}
    if kind in _WITH_LIMIT:
        return _WITH_LIMIT[kind](limit)
    return _EXPECTED.get(kind, "a value of another kind")


def _locate(body: Any, error: Mapping[str, Any]) -> Path:
    """The field that an error is about.

    pydantic's location also contains branches of unions and tags, which are not part of the body. If a part could be
    either (the tag ``text`` or the field ``text``), the path that ends at the error's input is right.
    """
    parts = list(error["loc"][1:])
    if parts and parts[-1] == "[key]":
        return _greedy(body, parts[:-2])
    is_missing = error["type"] == "missing" and bool(parts)
    walked = parts[:-1] if is_missing else parts
    found = _walk(body, walked, error.get("input"), ())
    path = _greedy(body, walked) if found is None else found
    if is_missing:
        return (*path, parts[-1])
    tag = (error.get("ctx") or {}).get("discriminator")
    return (*path, tag.strip("'")) if tag else path


def _walk(value: Any, parts: Sequence[int | str], target: Any, path: Path) -> Path | None:
    if not parts:
        return path if value is target or value == target else None
    part, rest = parts[0], parts[1:]
    if _holds(value, part):
        found = _walk(value[part], rest, target, (*path, part))
        if found is not None:
            return found
    return _walk(value, rest, target, path) if isinstance(part, str) else None


def _greedy(value: Any, parts: Sequence[int | str]) -> Path:
    path: Path = ()
    for part in parts:
        if _holds(value, part):
            value = value[part]
            path = (*path, part)
    return path


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(part, int):
        return isinstance(value, list) and part < len(value)
    return isinstance(value, dict) and part in value


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
