"""Read the files of a ZIP archive in memory. Their unpacked size is limited before anything is decompressed."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator

from babydoctor.serve.page.texts import PageError

MAX_FILES = 5000
"""Largest number of files of a study, in an archive or not."""

MAX_STUDY_BYTES = 512 * 2**20
"""Largest size of a study, both as sent and unpacked."""

MAX_RATIO = 100
"""Largest compression ratio of an archive of more than ``SMALL_BYTES``. DICOM images reach 2 or 3."""

SMALL_BYTES = 16 * 2**20

_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_MAX_ENTRY_BYTES = 512
"""Size of a file's entry in the directory: 46 bytes, its name and extra fields."""

_ARCHIVE_MAGIC = (
    *(b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"BZh", b"\xfd7zXZ\0"),
    b"(\xb5/\xfd",
)


class Refused(Exception):
    """One file of a study that cannot be read. ``code`` is a key of ``reasons.UNREAD``."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def is_zip(data: bytes) -> bool:
    return data.startswith((b"PK\x03\x04", _END))


def is_archive(data: bytes) -> bool:
    """True for an archive or a compressed file of any common kind."""
    return data.startswith(_ARCHIVE_MAGIC) or data[257:262] == b"ustar"


class Archive:
    """A ZIP archive.

    Raises:
        PageError: it is damaged, has too many files, or would unpack to too much.
    """

    def __init__(self, data: bytes) -> None:
        _check_directory(data)
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError):
            raise PageError("zip_damaged") from None
        self._members = [member for member in self._zip.infolist() if not member.is_dir()]
        unpacked = sum(member.file_size for member in self._members)
        if len(self._members) > MAX_FILES:
            raise PageError("study_too_many")
        if unpacked > MAX_STUDY_BYTES:
            raise PageError("study_too_large")
        if unpacked > max(SMALL_BYTES, MAX_RATIO * len(data)):
            raise PageError("zip_bomb")

    def __len__(self) -> int:
        return len(self._members)

    def files(self) -> Iterator[bytes | Refused]:
        """The content of each file, or why it cannot be read. ``zipfile`` reads at most what the directory states."""
        for member in self._members:
            if member.flag_bits & 0x1:
                yield Refused("encrypted")
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                yield Refused("zip_method")
            else:
                yield self._read(member)

    def _read(self, member: zipfile.ZipInfo) -> bytes | Refused:
        try:
            return self._zip.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError):
            return Refused("damaged")


def _check_directory(data: bytes) -> None:
    """Check the size of the directory, because ``zipfile`` reads all of it.

    Raises:
        PageError: there is no directory, or it has more entries or bytes than ``MAX_FILES`` need. Folders count.
    """
    at = data.rfind(_END, max(0, len(data) - 22 - 0xFFFF))
    if at < 0 or at + 22 > len(data):
        raise PageError("zip_damaged")
    entries, size = int.from_bytes(data[at + 10 : at + 12], "little"), int.from_bytes(data[at + 12 : at + 16], "little")
    if data[at - 20 : at - 16] == _LOCATOR_64 and at >= 20:
        large = int.from_bytes(data[at - 12 : at - 4], "little")
        if data[large : large + 4] != _END_64:
            raise PageError("zip_damaged")
        entries = int.from_bytes(data[large + 32 : large + 40], "little")
        size = int.from_bytes(data[large + 40 : large + 48], "little")
    if entries > 2 * MAX_FILES or size > 2 * MAX_FILES * _MAX_ENTRY_BYTES:
        raise PageError("study_too_many")
