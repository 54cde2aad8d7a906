"""Rows from JSON text: a list (streamed, however long) or one object per line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from babydoctor.schema import UserError

_CHUNK_CHARS = 1 << 20


class RepeatedKey(dict[str, Any]):
    """A JSON object in which ``key`` appears more than once. Python keeps the last value and drops the others."""

    key: str


class UnreadableRow:
    """Stands for a row that is not JSON; ``detail`` says why."""

    def __init__(self, detail: str) -> None:
        self.detail = detail


def iter_json(name: str, file: Any, *, expect_list: bool, advance: Callable[[], None]) -> Iterator[tuple[str, Any]]:
    """Yield ``(location, row)`` for each row of an open, seekable text file.

    Args:
        name: the file's name, for row locations and messages.
        expect_list: report a file that starts with neither ``[`` nor ``{`` as a malformed list, not as bad lines.
        advance: called regularly, so that the caller can read the file's position.

    Raises ``UserError`` if the text is not UTF-8, or the list is damaged.
    """
    try:
        first = _first_character(file)
        file.seek(0)
        is_list = first == "[" or (expect_list and first != "{")
        rows = _iter_json_list(name, file) if is_list else _iter_json_lines(name, file)
        for number, row in enumerate(rows):
            yield row
            if number % 1000 == 0:
                advance()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def _first_character(file: Any) -> str:
    while character := file.read(1):
        if not character.isspace():
            return character
    return ""


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) == len(pairs):
        return built
    keys = [key for key, _ in pairs]
    repeated = RepeatedKey(built)
    repeated.key = next(key for key in keys if keys.count(key) > 1)
    return repeated


def _iter_json_lines(name: str, file: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=build_object)
        except (ValueError, RecursionError) as error:
            row = UnreadableRow(str(error))
        yield f"{name}:{number}", row


_WHOLE_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)


def _is_in_open_string(text: str, position: int) -> bool:
    """True if a JSON string starts at ``position`` and does not end within ``text``."""
    return text[position : position + 1] == '"' and _WHOLE_STRING.match(text, position) is None


def _iter_json_list(name: str, file: Any) -> Iterator[tuple[str, Any]]:
    """Read one or more JSON lists row by row, without holding the whole file in memory."""
    decoder = json.JSONDecoder(object_pairs_hook=build_object)
    buffer, position, index, at_end = "", 0, 0, False
    expected, is_closed, in_list = "[", False, 0
    while True:
        while position < len(buffer) and buffer[position].isspace():
            position += 1
        if position == len(buffer) or (expected == "row" and not at_end and len(buffer) - position < _CHUNK_CHARS // 4):
            chunk = file.read(_CHUNK_CHARS)
            at_end = not chunk
            if not at_end or position < len(buffer):
                buffer, position = buffer[position:] + chunk, 0
            if position == len(buffer):
                if is_closed:
                    return
                raise UserError(f"{name}: ends after {index} rows, before the list is closed; is it cut off?")
            continue
        if expected == "row" and (buffer[position] != "]" or in_list > 0):
            try:
                row, position = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                # The row may continue in the next chunk.
                is_cut = _is_in_open_string(buffer, error.pos) or error.pos > len(buffer) - 16
                chunk = file.read(_CHUNK_CHARS) if is_cut else ""
                if chunk:
                    buffer, position = buffer[position:] + chunk, 0
                    continue
                near = buffer[max(position, error.pos - 30) : error.pos + 30]
                fix = "is the file cut off?" if is_cut else "fix the row by hand"
                raise UserError(f"{name}: row {index} is not valid JSON ({error.msg} near {near!r}); {fix}") from error
            except RecursionError as error:
                raise UserError(f"{name}: row {index} is nested too deeply to be a row") from error
            yield f"{name}#{index}", row
            index, in_list, expected = index + 1, in_list + 1, ","
            continue
        character = buffer[position]
        if character == "]" and expected != "[":
            position, expected, is_closed, in_list = position + 1, "[", True, 0
            continue
        if is_closed and character != "[":
            near = buffer[position : position + 30]
            raise UserError(
                f"{name}: after the list of {index} rows comes {near!r}; remove it, or write one row a line"
            )
        if character != expected:
            raise UserError(f"{name}: must be a JSON list of rows; found {character!r} instead of {expected!r}")
        position, expected, is_closed = position + 1, "row", False
