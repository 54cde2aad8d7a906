"""Bytes -> DICOM data set and its transfer syntax, with or without preamble, file meta information or delimiter."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass, field
from typing import Any

from babydoctor.imaging.containers import picture_format
from babydoctor.imaging.dicom.safety import check_deflated
from babydoctor.imaging.dicom.values import code
from babydoctor.imaging.limits import ImageError

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

_FIRST_GROUPS = (0x0002, 0x0008, 0x0010, 0x0018, 0x0020, 0x0028)
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_VRS = frozenset(
    [
        *(*_LONG_VRS, b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN"),
        *(b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"),
    ]
)
_ENCAPSULATED_PIXELS = re.compile(rb"\xe0\x7f\x10\x00(?:O[BW]\0\0|UN\0\0)?\xff\xff\xff\xff")
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"

_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"


@dataclass(frozen=True)
class DicomFile:
    """A parsed file. ``transfer_syntax`` is a UID; ``warnings`` say what is missing and what was assumed."""

    dataset: Any = field(repr=False)
    transfer_syntax: str
    is_encapsulated: bool
    is_big_endian: bool
    warnings: tuple[str, ...] = ()


def is_dicom(data: bytes) -> bool:
    """Recognize DICOM by content: by its prefix, or by a first data element from a group that files begin with."""
    if data[128:132] == b"DICM":
        return True
    return picture_format(data) is None and _start_of_elements(data) is not None


def _start_of_elements(data: bytes) -> int | None:
    """Position of the first data element in a file without the regular prefix."""
    for start in (0, 4 if data[:4] == b"DICM" else None, None if data[:128].strip(b"\0") else 128):
        if start is not None and _is_element(data[start : start + 12], len(data)):
            return start
    return None


def _is_element(head: bytes, size: int) -> bool:
    if len(head) < 8:
        return False
    group = int.from_bytes(head[:2], "little")
    if group not in _FIRST_GROUPS:
        return int.from_bytes(head[:2], "big") in _FIRST_GROUPS and head[4:6] in _VRS
    return head[4:6] in _VRS or int.from_bytes(head[4:8], "little") <= size


def parse_file(data: bytes, name: str, max_pixels: int) -> DicomFile:
    """Parse a file with pydicom and decide its transfer syntax.

    Raises:
        ImageError: it is not DICOM, holds no image, or is deflated and too large.
    """
    if data[128:132] != b"DICM":
        start = _start_of_elements(data)
        if start is None:
            raise ImageError(f"{name}: holds no image (no DICOM object); give a DICOM file", "dicom_without_image")
        data = data[start:]
    meta_syntax, meta_end = _walk_meta(data)
    if meta_syntax == "1.2.840.10008.1.2.1.99":
        check_deflated(data[meta_end:], name, max_pixels)
    warnings: list[str] = []
    dataset = _read(data)
    if _pixel_keyword(dataset) is None and (closed := _close_sequence(data, name)) is not None:
        dataset = _read(closed)
        warnings.append("the delimiter after the pixel data is missing; all frames found are shown")
    keyword = _pixel_keyword(dataset)
    if keyword is None:
        kind = code(dataset, "Modality") or "no DICOM object"
        raise ImageError(f"{name}: holds no image ({kind}); give a DICOM file with pixel data", "dicom_without_image")
    syntax, is_big_endian = _transfer_syntax(dataset, keyword, name, warnings)
    is_encapsulated = syntax not in (_IMPLICIT, _EXPLICIT, _BIG_ENDIAN, "1.2.840.10008.1.2.1.99")
    return DicomFile(dataset, syntax, is_encapsulated, is_big_endian, tuple(warnings))


def _read(data: bytes) -> Any:
    import pydicom

    return pydicom.dcmread(io.BytesIO(data), force=True)


def _pixel_keyword(dataset: Any) -> str | None:
    return next((key for key in PIXEL_KEYWORDS if key in dataset), None)


def _walk_meta(data: bytes) -> tuple[str, int]:
    """Walk the file meta information (explicit VR little endian): (transfer syntax or "", position after it)."""
    position, syntax = 132 if data[128:132] == b"DICM" else 0, ""
    while data[position : position + 2] == b"\x02\x00" and position + 12 <= len(data):
        is_long = data[position + 4 : position + 6] in _LONG_VRS
        at = position + (12 if is_long else 8)
        length = int.from_bytes(data[at - (4 if is_long else 2) : at], "little")
        if data[position + 2 : position + 4] == b"\x10\x00":
            syntax = data[at : at + length].rstrip(b"\0 ").decode("ascii", "replace")
        position = at + length
    return syntax, position


def _close_sequence(data: bytes, name: str) -> bytes | None:
    """Append the missing delimiter of encapsulated pixel data; None if that is not what is wrong."""
    matches = list(_ENCAPSULATED_PIXELS.finditer(data))
    if not matches:
        return None
    position = matches[-1].end()
    while data[position : position + 4] == _ITEM:
        position += 8 + int.from_bytes(data[position + 4 : position + 8], "little")
    if position > len(data):
        raise ImageError(f"{name}: the compressed pixel data is cut off", "dicom_unreadable")
    return data[:position] + _DELIMITER + b"\0\0\0\0" if not data[position:].strip(b"\0") else None


def _transfer_syntax(dataset: Any, keyword: str, name: str, warnings: list[str]) -> tuple[str, bool]:
    """(UID, is big endian) by the file meta information, else by how the file is written."""
    from pydicom.uid import UID

    is_implicit, is_little = dataset.original_encoding
    meta = getattr(dataset, "file_meta", None)
    stated = str((meta.get("TransferSyntaxUID") if meta is not None else None) or "")
    written = _IMPLICIT if is_implicit else _EXPLICIT if is_little else _BIG_ENDIAN
    data = dataset[keyword].value or b""
    looks_encapsulated = keyword == "PixelData" and (
        bool(getattr(dataset[keyword], "is_undefined_length", False)) or data[:4] == _ITEM
    )
    uid = UID(stated)
    if stated and uid.is_transfer_syntax and uid.is_encapsulated == looks_encapsulated:
        return stated, not is_little
    if stated and not uid.is_transfer_syntax:
        raise ImageError(f"{name}: cannot read the transfer syntax {describe_uid(stated)}", "dicom_unsupported")
    if stated and uid.is_encapsulated:
        raise ImageError(
            f"{name}: the transfer syntax is {describe_uid(stated)}, but the pixel data is not compressed that way",
            "dicom_unreadable",
        )
    guessed = _syntax_of_codestream(data) if looks_encapsulated else written
    if guessed is None:
        raise ImageError(
            f"{name}: the pixel data is compressed, and the file does not say how (no transfer syntax)",
            "dicom_unsupported",
        )
    fault = "the transfer syntax is missing" if not stated else f"the transfer syntax says {describe_uid(stated)}"
    warnings.append(f"{fault}; read as {describe_uid(guessed)}")
    return guessed, not is_little


def describe_uid(uid: str) -> str:
    """Name and UID, or only the UID if it is private."""
    from pydicom.uid import UID

    if not re.fullmatch(r"[0-9.]{1,64}", uid):
        return "a value that is not a UID"

    known = UID(uid).name
    return f"{known} ({uid})" if known != uid else uid


def _syntax_of_codestream(data: bytes) -> str | None:
    """The transfer syntax of encapsulated pixel data, judged by its first codestream; None if unknown."""
    frames = fragments(data)
    first = frames[0] if frames else b""
    base = "1.2.840.10008.1.2.4."
    if first[:4] == b"\xff\x4f\xff\x51":
        return base + "91"
    if first[:2] == b"\xff\xd8":
        position = 2
        while position + 4 <= len(first) and first[position] == 0xFF:
            marker = first[position + 1]
            if marker in (0xC0, 0xC1, 0xC3, 0xF7):
                return base + {0xC0: "50", 0xC1: "51", 0xC3: "57", 0xF7: "81"}[marker]
            position += 2 + int.from_bytes(first[position + 2 : position + 4], "big")
        return None
    is_rle = len(first) > 64 and 1 <= struct.unpack_from("<I", first)[0] <= 15 and first[4:8] == b"\x40\0\0\0"
    return "1.2.840.10008.1.2.5" if is_rle else None


def fragments(data: bytes) -> list[bytes]:
    """Items of encapsulated pixel data after the offset table. A truncated item ends them."""
    found, position = [], 0
    while data[position : position + 4] == _ITEM:
        end = position + 8 + int.from_bytes(data[position + 4 : position + 8], "little")
        if end > len(data):
            break
        found.append(data[position + 8 : end])
        position = end
    return found[1:]
