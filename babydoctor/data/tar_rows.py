"""Rows of WebDataset shards: tar files in which the members of a row share the name up to the first dot.

``000017.json`` is the row and ``000017.jpg`` its image. Rows refer to images by their byte offset in the shard, so
images can be read on demand, in any order. Source: https://github.com/webdataset/webdataset (README, "The WebDataset
Format").
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from babydoctor.data.dataset_rows import EMBEDDED
from babydoctor.data.json_rows import UnreadableRow, build_object
from babydoctor.schema import UserError

_IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "dcm"))


def iter_tar(name: str, file: BinaryIO, advance: Callable[[], None]) -> Iterator[tuple[str, Any]]:
    """Yield ``(location, row)`` for each row of a shard, in order.

    Args:
        advance: called after each row.

    Raises ``UserError`` for a compressed or damaged shard, and for members that are neither JSON nor an image.
    """
    key = ""
    members: list[tuple[str, bytes | None, str]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                shard.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
                if not member.isfile():
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if members and folder + slash + stem != key:
                    yield _build_row(name, key, members)
                    advance()
                    members = []
                key = folder + slash + stem
                content = shard.extractfile(member)
                is_json = extension.lower() == "json"
                text = content.read() if content is not None and is_json else None
                members.append((extension.lower(), text, f"{EMBEDDED}{name}#{member.offset_data}+{member.size}"))
            if members:
                yield _build_row(name, key, members)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{name}: not an uncompressed tar file, or cut off ({error}); decompress it or copy it again"
        ) from error


def _build_row(name: str, key: str, members: list[tuple[str, bytes | None, str]]) -> tuple[str, Any]:
    where = f"{name}#{key}"
    texts = [text for _, text, _ in members if text is not None]
    images = [reference for extension, _, reference in members if extension in _IMAGES]
    others = [extension for extension, text, _ in members if text is None and extension not in _IMAGES]
    if others:
        raise UserError(f"{where}: has a member .{others[0]}; a row has one .json member and at most one image")
    if len(texts) != 1:
        return where, UnreadableRow(f"{len(texts)} .json members in the shard; a row needs exactly one")
    try:
        row = json.loads(texts[0], object_pairs_hook=build_object)
    except (ValueError, RecursionError) as error:
        return where, UnreadableRow(str(error))
    if isinstance(row, dict):
        row.setdefault("id", key)
        if len(images) == 1:
            row["image"] = images[0]
        elif images:
            row["images"] = images
    return where, row


def read_range(file: BinaryIO, place: str, reference: str) -> bytes:
    """The bytes at ``OFFSET+SIZE``. Raises ``UserError`` if the file is shorter."""
    offset, _, size = place.partition("+")
    file.seek(int(offset))
    data = file.read(int(size))
    if len(data) != int(size):
        raise UserError(f"{reference}: the shard ends before the image does; was it rewritten or cut off?")
    return data
