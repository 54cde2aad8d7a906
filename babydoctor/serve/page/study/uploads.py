"""Uploads of studies from the browser, an archive or a PACS, in memory until a session takes them.

Several files are one body: for each file, its length (uint32, little-endian) and its content. Their names stay in the
browser. The reply reports the progress of reading, one JSON object per line: ``{"read": 3, "of": 120}``. The last line
is ``{"study": TOKEN}`` or ``{"error": CODE}``.
"""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from babydoctor.serve.page.handlers import as_page_error
from babydoctor.serve.page.study.archive import MAX_FILES, MAX_STUDY_BYTES, Archive, Refused, is_zip
from babydoctor.serve.page.study.pacs_files import PacsFiles
from babydoctor.serve.page.study.study import Study, StudyReader
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.uploads import Waiting

MAX_ARRIVING_BYTES = 2 * MAX_STUDY_BYTES
"""Largest size of all studies that arrive or are read at the same time."""

MAX_WAITING_BYTES = 2 * MAX_STUDY_BYTES
ARRIVAL_S = 900.0
"""Time limit for all files of a study to arrive."""

PROGRESS_S = 0.2
"""Shortest time between two progress lines."""

_LENGTH_BYTES = 4


class FileSource(Protocol):
    """A source of files that are read one by one. ``files`` may block."""

    def __len__(self) -> int: ...

    def files(self) -> Iterator[bytes | Refused]: ...


@dataclass(frozen=True)
class FileList:
    """Files that have arrived from the browser."""

    contents: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.contents)

    def files(self) -> Iterator[bytes | Refused]:
        return iter(self.contents)


class StudyUploads:
    """Studies that no session has taken yet, and sources that are waiting to be read."""

    def __init__(self) -> None:
        self.studies: Waiting[Study] = Waiting(MAX_WAITING_BYTES, "study_gone")
        self.sources: Waiting[FileSource] = Waiting(MAX_WAITING_BYTES, "study_gone")
        self._num_arriving = 0

    async def receive(self, chunks: AsyncIterator[bytes]) -> FileSource:
        """The files of a request's body: an archive, or files with their lengths.

        Raises:
            PageError: there are too many files, they are too large, or the body is damaged or broke off.
        """
        counted = [0]
        try:
            source = await asyncio.wait_for(self._receive(chunks, counted), ARRIVAL_S)
        except BaseException as error:
            self._release(counted[0])
            if isinstance(error, PageError) or not isinstance(error, Exception):
                raise
            raise PageError("upload_broken") from None  # too slow, or the browser disconnected
        weakref.finalize(source, self._release, counted[0])  # no session may ever ask for it
        return source

    def drop_old(self) -> None:
        """Delete studies and sources that were not taken in time."""
        self.studies.drop_old()
        self.sources.drop_old()

    def _release(self, num_bytes: int) -> None:
        self._num_arriving -= num_bytes

    async def _receive(self, chunks: AsyncIterator[bytes], counted: list[int]) -> FileSource:
        files: list[bytes] = []
        buffer = bytearray()
        is_packed: bool | None = None
        async for chunk in chunks:
            buffer += chunk
            counted[0] += len(chunk)
            self._num_arriving += len(chunk)
            if counted[0] > MAX_STUDY_BYTES + _LENGTH_BYTES * MAX_FILES:
                raise PageError("study_too_large")
            if self._num_arriving > MAX_ARRIVING_BYTES:
                raise PageError("uploads_busy")
            if is_packed is None and len(buffer) >= _LENGTH_BYTES:
                is_packed = is_zip(bytes(buffer[:_LENGTH_BYTES]))
            if is_packed is False:
                _cut(buffer, files)
        if is_packed:
            return await asyncio.to_thread(Archive, bytes(buffer))
        if buffer:
            raise PageError("upload_broken")
        return FileList(files)

    async def read(self, source: FileSource) -> AsyncIterator[bytes]:
        """Read all files and keep the study for a session. Yields the lines of the reply."""
        reader, files = StudyReader(), source.files()
        num_read, told_s = 0, 0.0
        try:
            while (file := await asyncio.to_thread(next, files, None)) is not None:
                await asyncio.to_thread(reader.add, file)
                num_read += 1
                if time.monotonic() - told_s > PROGRESS_S:
                    told_s = time.monotonic()
                    yield _line(read=num_read, of=len(source))
            study = await asyncio.to_thread(reader.study)
            if isinstance(source, PacsFiles):
                study.origin, study.extends_loaded = source.client, source.has_kept
            yield _line(study=self.studies.put(study, study.num_bytes))
        except Exception as error:
            yield _line(error=as_page_error(error).code)


def _cut(buffer: bytearray, files: list[bytes]) -> None:
    """Move complete files from the buffer to the list."""
    at = 0
    while len(buffer) - at >= _LENGTH_BYTES:
        end = at + _LENGTH_BYTES + int.from_bytes(buffer[at : at + _LENGTH_BYTES], "little")
        if end > len(buffer):
            break
        files.append(bytes(buffer[at + _LENGTH_BYTES : end]))
        at = end
    del buffer[:at]
    if len(files) > MAX_FILES:
        raise PageError("study_too_many")


def _line(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"
