"""Where rows come from: LLaVA JSON, JSONL, or a data set of the ``datasets`` library. Rows are not checked here.

Every source is read as a stream: LCS-558K is 558,128 rows in one JSON list. Embedded images would not fit in memory,
so rows refer to them and they are read when needed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from babydoctor.hub import data_set_error, describe
from babydoctor.schema import UserError

EMBEDDED = "embedded://"
"""Reference to an image that is stored in a data set: ``embedded://SOURCE#ROW``."""

SOURCES_FILE = "sources.json"
"""Beside prepared rows: the published sources that they were made of, each with its version."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+(:[\w.\-]+)?")
_CHUNK_CHARS = 1 << 20


class RepeatedKey(dict[str, Any]):
    """A JSON object in which ``key`` appears more than once. Python keeps the last value and drops the others."""

    key: str


class UnreadableRow:
    """Takes the place of a row that is not JSON; ``detail`` says why."""

    def __init__(self, detail: str) -> None:
        self.detail = detail


def iter_rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, row)`` for each row of a source, in order.

    ``source`` is a ``.json`` list, a ``.jsonl`` file, a ``.parquet`` file, a directory (written by ``save_to_disk``
    or holding parquet or JSON files) or a hub id; a directory or hub id may name its split: ``path:validation``.
    A JSONL line that is not JSON comes as ``UnreadableRow``. Images stored in a data set come as ``embedded://``
    references.

    Raises ``UserError`` where the source is not there or cannot be read from some place on.
    """
    text = str(source)
    path = Path(text)
    if path.is_file() and path.suffix != ".parquet":
        try:
            with path.open(encoding="utf-8-sig") as file:
                first = _first_character(file)
                file.seek(0)
                is_list = first == "[" or (path.suffix == ".json" and first != "{")
                yield from _iter_json_list(path, file) if is_list else _iter_json_lines(path, file)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
        return
    is_hub_id = _HUB_ID.fullmatch(text) and path.suffix not in (".json", ".jsonl", ".parquet")
    if not path.exists() and not _split_of(text)[0].exists() and not is_hub_id:
        raise UserError(f"{text}: no such file or directory, nor the id of a data set on the hub (owner/name)")
    yield from _iter_dataset(text)


def read_sources(folder: Path) -> dict[str, str]:
    """Name -> version of the published sources of the rows in a folder; empty where none is recorded."""
    path = folder / SOURCES_FILE
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove it or make the rows again") from error
    return {str(name): str(version) for name, version in loaded.items()} if isinstance(loaded, dict) else {}


def published_versions(sources: Iterable[str | Path]) -> dict[str, str]:
    """Where rows were published and in which version (a commit on the hub), for a run's manifest.

    ``sources`` are those of ``iter_rows``. Rows without a record of their origin add nothing.
    """
    versions: dict[str, str] = {}
    for source in sources:
        path = _split_of(str(source))[0]
        if path.exists():
            versions |= read_sources(path if path.is_dir() else path.parent)
        else:
            versions |= _hub_commit(str(source))
    return versions


def _hub_commit(source: str) -> dict[str, str]:
    """The commit that a data set from the hub was loaded at, from the addresses that ``datasets`` keeps."""
    for address in _open_dataset(source).info.download_checksums or {}:
        if match := re.match(r"hf://(datasets/[^@]+)@([0-9a-f]{40})/", address):
            return {match[1]: match[2]}
    return {}


def _first_character(file: Any) -> str:
    while character := file.read(1):
        if not character.isspace():
            return character
    return ""


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) == len(pairs):
        return built
    keys = [key for key, _ in pairs]
    repeated = RepeatedKey(built)
    repeated.key = next(key for key in keys if keys.count(key) > 1)
    return repeated


def _iter_json_lines(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_build_object)
        except (ValueError, RecursionError) as error:
            row = UnreadableRow(str(error))
        yield f"{path}:{number}", row


_WHOLE_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)


def _is_in_open_string(text: str, position: int) -> bool:
    """True where a JSON string begins at ``position`` and does not end in ``text``."""
    return text[position : position + 1] == '"' and _WHOLE_STRING.match(text, position) is None


def _iter_json_list(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    """Read a JSON list (or several, one after the other) row by row, so that the file is never held as a whole."""
    decoder = json.JSONDecoder(object_pairs_hook=_build_object)
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
                raise UserError(f"{path}: ends after {index} rows, before the list is closed; is it cut off?")
            continue
        if expected == "row" and (buffer[position] != "]" or in_list > 0):
            try:
                row, position = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                # Perhaps only because the row goes on in the next chunk.
                is_cut = _is_in_open_string(buffer, error.pos) or error.pos > len(buffer) - 16
                chunk = file.read(_CHUNK_CHARS) if is_cut else ""
                if chunk:
                    buffer, position = buffer[position:] + chunk, 0
                    continue
                near = buffer[max(position, error.pos - 30) : error.pos + 30]
                fix = "is the file cut off?" if is_cut else "fix the row by hand"
                raise UserError(f"{path}: row {index} is not valid JSON ({error.msg} near {near!r}); {fix}") from error
            except RecursionError as error:
                raise UserError(f"{path}: row {index} is nested too deeply to be a row") from error
            yield f"{path}#{index}", row
            index, in_list, expected = index + 1, in_list + 1, ","
            continue
        character = buffer[position]
        if character == "]" and expected != "[":
            position, expected, is_closed, in_list = position + 1, "[", True, 0
            continue
        if is_closed and character != "[":
            near = buffer[position : position + 30]
            raise UserError(
                f"{path}: after the list of {index} rows comes {near!r}; remove it, or write one row a line"
            )
        if character != expected:
            raise UserError(f"{path}: must be a JSON list of rows; found {character!r} where {expected!r} belongs")
        position, expected, is_closed = position + 1, "row", False


def _split_of(source: str) -> tuple[Path, str | None]:
    """``path:split`` -> path and split; a colon that belongs to an existing path stays in it."""
    if Path(source).exists() or ":" not in source:
        return Path(source), None
    path, split = source.rsplit(":", 1)
    return Path(path), split


@functools.lru_cache(maxsize=8)
def _open_dataset(source: str) -> Any:
    """Open a data set, memory-mapped, with undecoded images. Kept open: workers ask for it image by image."""
    import datasets

    path, split = _split_of(source)
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:  # a directory of parquet or JSON files, or a hub id; splits are told by file names
            loaded = datasets.load_dataset(str(path))
    except Exception as error:  # the library raises its own, pyarrow's, the hub's and the network's errors
        if not path.exists():
            hint = "Offline, give a file or a directory that is already here"
            raise data_set_error(error, str(path), hint=hint) from error
        raise UserError(f"{source}: cannot be opened as a data set ({describe(error)})") from error
    if isinstance(loaded, dict):
        name = split or ("train" if "train" in loaded else "")
        if name not in loaded:
            raise UserError(
                f"{source}: has the splits {', '.join(loaded)}; name one, as in {path}:{next(iter(loaded))}"
            )
        loaded = loaded[name]
    elif split is not None:
        raise UserError(f"{source}: has no splits; leave out {':' + split!r}")
    if isinstance(loaded.features.get("image"), datasets.Image):
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
    return loaded


def _iter_dataset(source: str) -> Iterator[tuple[str, Any]]:
    dataset = _open_dataset(source)
    index = 0
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "image"}
        images = _image_column(table, source, index) if "image" in table.column_names else None
        for offset in range(table.num_rows):
            row = {name: values[offset] for name, values in columns.items()}
            for name in ("conversations", "messages"):
                if name in row:
                    row[name] = _turns_of(row[name])
            if images is not None and images[offset] is not None:
                row["image"] = images[offset]
            if "images" in row:
                row["images"] = _refer_to_embedded(row["images"], f"{EMBEDDED}{source}#{index}")
            yield f"{source}#{index}", row
            index += 1


def _image_column(table: Any, source: str, start: int) -> list[str | None]:
    """One reference a row: a file name unchanged, an embedded image by its row, None for text only."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column("image")
    if pa.types.is_struct(column.type):
        names = pc.struct_field(column, "path").to_pylist()
        embedded = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        names, embedded = [None] * len(column), pc.is_valid(column).to_pylist()
    else:
        return column.to_pylist()
    return [
        f"{EMBEDDED}{source}#{start + offset}" if has_bytes else name
        for offset, (name, has_bytes) in enumerate(zip(names, embedded, strict=True))
    ]


def _refer_to_embedded(images: Any, reference: str) -> Any:
    """A list with one embedded image -> a reference to it, so that its bytes do not stay in memory."""
    if not isinstance(images, list) or len(images) != 1:
        return images
    image = images[0]
    is_embedded = isinstance(image, bytes) or (isinstance(image, dict) and image.get("bytes") is not None)
    return [reference] if is_embedded else images


def _turns_of(value: Any) -> Any:
    """Undo how ``datasets`` stores lists of objects (as an object of lists) and how some authors do (as text)."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        keys = list(value)
        return [dict(zip(keys, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value


def read_embedded(reference: str) -> bytes:
    """The encoded bytes of an ``embedded://SOURCE#ROW`` image."""
    source, _, row = reference.removeprefix(EMBEDDED).rpartition("#")
    table = _open_dataset(source).with_format("arrow")[int(row) : int(row) + 1]  # undecoded
    images = [table.column(name).to_pylist()[0] for name in ("image", "images") if name in table.column_names]
    image = next((image for image in images if image), None)
    image = image[0] if isinstance(image, list) else image
    data = image["bytes"] if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise UserError(f"{reference}: the data set holds no image there any more; was it rewritten?")
    return data
