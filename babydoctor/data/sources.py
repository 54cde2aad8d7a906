"""Read rows from files, folders, data sets on the hub and URLs. Rows are not checked here.

Sources are streamed, because LCS-558K alone is a JSON list of 558,128 rows. Embedded images stay in their source until
they are needed; rows refer to them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from babydoctor.data.dataset_rows import EMBEDDED, iter_dataset, open_dataset, read_dataset_image, split_of
from babydoctor.data.json_rows import iter_json
from babydoctor.data.tar_rows import iter_tar, read_range
from babydoctor.files import check_readable
from babydoctor.hub import describe
from babydoctor.schema import UserError

SOURCES_FILE = "sources.json"
"""File in a folder of prepared rows that lists their published sources, each with its version."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+(:[\w.\-]+)?")
_URL = re.compile(r"[a-z][a-z0-9+.\-]+://", re.IGNORECASE)
_FILE_KINDS = (".json", ".jsonl", ".parquet", ".arrow", ".tar")


def iter_rows(source: str | Path, progress: Callable[[float], None] = lambda share: None) -> Iterator[tuple[str, Any]]:
    """Yield ``(location, row)`` for each row of a source, in order.

    ``source`` is a ``.json`` list, a ``.jsonl``, ``.parquet`` or ``.arrow`` file, a WebDataset shard (``.tar``), each
    on this disk or at a URL that ``fsspec`` opens (``hf://``, ``s3://``, ``https://``); a folder (written by
    ``save_to_disk`` or ``babydoctor data convert``, or holding shards, parquet or JSON files) or a hub id. A folder or
    hub id may name its split: ``path:validation``. A JSONL line that is not JSON comes as ``UnreadableRow``. Images
    stored in a data set come as ``embedded://`` references.

    Args:
        progress: called regularly with the fraction of the source read so far, 0 to 1.

    Raises ``UserError`` if the source does not exist or is damaged.
    """
    text = str(source)
    path, kind, is_url = Path(text), PurePosixPath(text).suffix.lower(), _URL.match(text) is not None
    if path.is_file():
        check_readable(path)
    if path.is_dir() and (shards := sorted(path.glob("*.tar"))):
        for index, shard in enumerate(shards):

            def report(share: float, index: int = index) -> None:
                progress((index + share) / len(shards))

            yield from iter_rows(shard, report)
    elif path.is_file() or is_url:
        if kind in (".parquet", ".arrow"):
            yield from iter_dataset(text, progress)
        else:
            yield from _iter_file(text, kind, progress)
    else:
        is_hub_id = _HUB_ID.fullmatch(text) and kind not in _FILE_KINDS
        if not path.exists() and not split_of(text)[0].exists() and not is_hub_id:
            raise UserError(f"{text}: no such file or directory, nor the id of a data set on the hub (owner/name)")
        yield from iter_dataset(text, progress)


def iter_sources(
    sources: Iterable[str | Path], update: Callable[[str, int, int], None], doing: str
) -> Iterator[tuple[str, Any]]:
    """The rows of several sources as one stream.

    Args:
        update: takes description, done and total, as from ``progress.named_progress``.
        doing: first word of the description, for example ``converting``.
    """
    for source in sources:

        def report(share: float, source: str | Path = source) -> None:
            update(f"{doing} {source} (percent)", round(100 * share), 100)

        yield from iter_rows(source, report)


def _iter_file(name: str, kind: str, progress: Callable[[float], None]) -> Iterator[tuple[str, Any]]:
    with _open(name) as (file, size):

        def advance() -> None:
            progress(min(1.0, file.tell() / max(1, size)))

        if kind == ".tar":
            yield from iter_tar(name, file, advance)
        else:
            with io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
                yield from iter_json(name, lines, expect_list=kind == ".json", advance=advance)


@contextmanager
def _open(name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A file on this disk or at a URL, and its size in bytes."""
    if not _URL.match(name):
        with Path(name).open("rb") as local:
            yield local, Path(name).stat().st_size
        return
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(name)
        size, file = file_system.size(path) or 0, file_system.open(path, "rb")
    except Exception as error:  # each file system raises its own errors; a missing package raises ImportError
        raise UserError(f"{name}: cannot be opened ({describe(error)}); check the URL and your access to it") from error
    with file:
        yield file, size


def read_embedded(reference: str) -> bytes:
    """The encoded bytes of an ``embedded://SOURCE#ROW`` or ``embedded://SHARD.tar#OFFSET+SIZE`` image."""
    source, _, place = reference.removeprefix(EMBEDDED).rpartition("#")
    if "+" not in place:
        return read_dataset_image(source, int(place))
    with _open(source) as (file, _):
        return read_range(file, place, reference)


def read_sources(folder: Path) -> dict[str, str]:
    """Name -> version of the published sources of the rows in a folder; empty if none is recorded."""
    path = folder / SOURCES_FILE
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove it or make the rows again") from error
    return {str(name): str(version) for name, version in loaded.items()} if isinstance(loaded, dict) else {}


def published_versions(sources: Iterable[str | Path]) -> dict[str, str]:
    """Name -> version (a commit on the hub) of the published sources of rows, for a run's manifest.

    ``sources`` are those of ``iter_rows``. Rows without a recorded origin are skipped.
    """
    versions: dict[str, str] = {}
    for source in sources:
        if _URL.match(str(source)):
            continue
        path = split_of(str(source))[0]
        if path.exists():
            versions |= read_sources(path if path.is_dir() else path.parent)
        else:
            versions |= _hub_commit(str(source))
    return versions


def _hub_commit(source: str) -> dict[str, str]:
    """The hub commit that a data set was loaded from, taken from the URLs that ``datasets`` records."""
    for address in open_dataset(source).info.download_checksums or {}:
        if match := re.match(r"hf://(datasets/[^@]+)@([0-9a-f]{40})/", address):
            return {match[1]: match[2]}
    return {}
