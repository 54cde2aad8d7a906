"""Read rows of several layouts as turns, an image and a system prompt.

The layouts are LLaVA's own and those of other trainers::

    LLaVA      {"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}]}
    ShareGPT   {"conversations": [...], "system": text, "images": [reference]}
    OpenAI     {"messages": [{"role": "user" | "assistant" | "system", "content": text or parts}], "images": [...]}

A row with content that a sample cannot hold (a second image, a video, a tool call, a weight on a turn) is bad, and the
error names the key. Only keys in ``METADATA`` and keys that start with ``_`` are ignored.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from babydoctor.data.json_rows import RepeatedKey
from babydoctor.data.problems import RowError
from babydoctor.schema import IMAGE_TOKEN, Role, Turn

METADATA = frozenset(
    (
        *("id", "idx", "uid", "qid", "pair_id", "question_id", "meta", "metadata"),
        *("model", "source", "data_source", "dataset", "dataset_name", "split", "license", "licence", "url"),
        *("domain", "modality", "body_part", "lang", "language", "category", "type", "width", "height"),
        *("question_type", "answer_type", "phrase_type", "image_organ", "organ", "image_modality", "content_type"),
        *("created", "date", "timestamp"),
    )
)
"""Keys of a row that describe the row and are not part of the conversation."""

_CONVERSATIONS = ("conversations", "conversatons", "messages")  # LLaVA-Med's files have the second spelling
_READ_KEYS = frozenset((*_CONVERSATIONS, "image", "images", "system"))

_SPEAKERS: dict[str, dict[str, Role | None]] = {
    "from": {"human": "user", "gpt": "assistant", "system": None},
    "role": {"user": "user", "assistant": "assistant", "system": None, "developer": None},
}
"""Key of a turn that names the speaker -> its values; None is the system prompt."""

_TEXT_KEYS = {"from": "value", "role": "content"}
_TURN_KEYS = {speaker: {speaker, text} for speaker, text in _TEXT_KEYS.items()}
_ROW_KEYS = _READ_KEYS | METADATA


@dataclass(frozen=True, slots=True)
class RowContent:
    """The content of a row. ``image`` is as in ``Sample``; ``IMAGE_TOKEN`` marks its position in a turn."""

    turns: list[Turn]
    image: str | bytes | None
    system: str | None


def read_row(row: Mapping[str, Any]) -> RowContent:
    """Read a row. The order of turns and the position of the image are checked elsewhere.

    Raises:
        RowError: the row is bad; the caller adds source and id.
    """
    key, items = _conversation(row)
    _check_keys(row, "", _ROW_KEYS)
    turns: list[Turn] = []
    system = _text(row["system"], "system") if not _is_empty(row.get("system")) else None
    images = _images_of_row(row)
    in_parts: list[str | bytes] = []
    for index, item in enumerate(items):
        role, text = _read_turn(item, f"{key}[{index}]", in_parts)
        if role is not None:
            turns.append(Turn(role, text))
        elif turns:
            raise RowError("system_turn", f"turn {index}: {text[:60]!r}")
        elif text.strip():
            if system is not None and system != text:
                raise RowError("system_turn", f"turn {index}: a second system prompt, {text[:60]!r}")
            system = text
    if images and in_parts:
        raise RowError("several_images", "the row names images, and so do its messages")
    images = images or in_parts
    if len(images) > 1:
        raise RowError("several_images", f"{len(images)} images")
    return RowContent(turns, images[0] if images else None, system)


def _conversation(row: Mapping[str, Any]) -> tuple[str, list[Any]]:
    present = [key for key in _CONVERSATIONS if not _is_empty(row.get(key))]
    if len(present) > 1:
        raise RowError("unknown_key", f"both {present[0]!r} and {present[1]!r}; keep one of them")
    if not present or not isinstance(row[present[0]], list):
        raise RowError(
            "not_a_row", f"conversations is missing, empty or no list; the keys are {', '.join(map(str, row))}"
        )
    return present[0], row[present[0]]


def _read_turn(item: Any, where: str, images: list[str | bytes]) -> tuple[Role | None, str]:
    """Role and text of a turn. Images inside the content are appended to ``images``."""
    speaker_key = next((key for key in _SPEAKERS if isinstance(item, dict) and key in item), None)
    if speaker_key is None:
        raise RowError("bad_turn", f"{where}: {str(item)[:80]}")
    text_key = _TEXT_KEYS[speaker_key]
    speaker, value = item[speaker_key], item.get(text_key)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS[speaker_key]:
        raise RowError("bad_turn", f"{where}: {speaker_key} is {str(speaker)[:40]!r}")
    _check_keys(item, f"{where}.", _TURN_KEYS[speaker_key])
    if isinstance(value, list) and speaker_key == "role":
        value = "\n".join(_read_part(part, f"{where}.content[{i}]", images) for i, part in enumerate(value))
    return _SPEAKERS[speaker_key][speaker], _text(value, f"{where}.{text_key}")


def _read_part(part: Any, where: str, images: list[str | bytes]) -> str:
    """One part of an OpenAI message as text; an image becomes ``IMAGE_TOKEN``."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        _check_keys(part, f"{where}.", {"type", "text"})
        return _text(part.get("text"), f"{where}.text")
    if kind not in ("image", "image_url"):
        raise RowError("bad_turn", f"{where}: {str(part)[:80]}")
    keys = {"image": ("image", "path", "url"), "image_url": ("image_url",)}[kind]
    _check_keys(part, f"{where}.", {"type", *keys})
    named = [part[key] for key in keys if not _is_empty(part.get(key))]
    if len(named) > 1:
        raise RowError("several_images", f"{where}: {' and '.join(key for key in keys if part.get(key))}")
    for value in named:  # a part without a value refers to the row's image
        if kind == "image_url" and isinstance(value, dict):
            _check_keys(value, f"{where}.image_url.", {"url", "detail"})
            value = value.get("url")
        images.append(_image(value, where))
    return IMAGE_TOKEN


def _images_of_row(row: Mapping[str, Any]) -> list[str | bytes]:
    image, images = row.get("image"), row.get("images")
    if image is not None and not isinstance(image, (str, bytes)):
        raise RowError("image_path", f"image is a {type(image).__name__}")
    if _is_empty(images):
        return [] if image is None else [image]  # the image folder reports an empty name as an error
    listed = [_image(value, "images") for value in (images if isinstance(images, list) else [images])]
    if image is not None and listed != [image]:
        raise RowError("several_images", "the row has image and images")
    return listed


def _image(value: Any, where: str) -> str | bytes:
    """The reference or bytes of an image, given as a file name, as ``datasets`` stores images, or as a data URL."""
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        head, _, data = value.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            raise RowError("image_path", f"{where}: the data URL {head[:40]!r} cannot be read ({error})") from None
    if not isinstance(value, (str, bytes)):
        raise RowError("image_path", f"{where}: a {type(value).__name__}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError("bad_turn", f"{where} is {str(value)[:60]!r}, not text")
    if not _is_unicode(value):
        raise RowError("bad_turn", f"{where} contains half of a surrogate pair, which is not valid text")
    return value


def _check_keys(item: Mapping[str, Any], prefix: str, known: frozenset[str] | set[str]) -> None:
    """Refuse keys whose values would be dropped. Empty values are ignored: tables fill missing cells with them."""
    if type(item) is dict and item.keys() <= known:
        return
    if isinstance(item, RepeatedKey):
        raise RowError("repeated_key", f"{prefix}{item.key}")
    for key, value in item.items():
        if key not in known and not str(key).startswith("_") and not _is_empty(value):
            raise RowError("unknown_key", f"{prefix}{key}: {str(value)[:60]!r}")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and len(value) == 0)


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can contain (``\\ud800``) but no tokenizer and no file accepts."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
