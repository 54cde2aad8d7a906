"""Guards against DICOM files that are small to send and huge to decode, and against personal data in warnings."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from babydoctor.imaging.limits import ImageError
from babydoctor.schema import UserError


@contextmanager
def reading_values(name: str) -> Iterator[None]:
    """Context manager around all reads of a data set's values, which pydicom parses on access.

    Any error on a damaged value becomes an ``ImageError`` for the file ``name``. Inside, pydicom does not quote invalid
    values, such as a patient's name, in warnings and logs.
    """
    from pydicom.config import disable_value_validation

    try:
        with disable_value_validation():
            yield
    except UserError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name}: decoding needs more memory than allowed", "image_decode_failed") from error
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ImageError(
            f"{name}: the DICOM file is damaged or not supported ({type(error).__name__}: {text})", "dicom_unreadable"
        ) from error


def check_deflated(deflated: bytes, name: str, max_pixels: int) -> None:
    """Raise ``ImageError`` if a deflated data set (PS3.5 A.5) is too large. Parsing would inflate all of it."""
    limit = min(16 * max_pixels, 2**28)
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        size, rest = 0, deflated
        while rest and size <= limit:
            size += len(inflater.decompress(rest, 1 << 24))
            rest = inflater.unconsumed_tail
    except zlib.error as error:
        raise ImageError(f"{name}: the deflated DICOM file is damaged ({error})", "dicom_unreadable") from error
    if size > limit:
        raise ImageError(
            f"{name}: inflates to more than {limit:,} bytes; too large to decode safely", "image_too_large"
        )


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that a JPEG, JPEG-LS or JPEG 2000 codestream declares; None for other data."""
    header = codestream_header(data)
    return None if header is None else header[:2]


def codestream_header(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, bits a sample) of a JPEG, JPEG-LS or JPEG 2000 codestream; None for other data.

    JPEG: ITU-T T.81 B.2.2, JPEG-LS: T.87 C.2.2, JPEG 2000: T.800 A.5.1.
    """
    siz = _codestream_start(data)
    if data[siz : siz + 4] == b"\xff\x4f\xff\x51" and len(data) >= siz + 43:  # start of codestream, then SIZ
        right, bottom, left, top = (int.from_bytes(data[siz + i : siz + i + 4], "big") for i in (8, 12, 16, 20))
        return right - left, bottom - top, (data[siz + 42] & 0x7F) + 1
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # fill byte
            position += 1
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:  # start of frame
            height, width = (int.from_bytes(data[position + i : position + i + 2], "big") for i in (5, 7))
            return width, height, data[position + 4]
        else:
            position += 2 + length
    return None


def _codestream_start(data: bytes) -> int:
    """Position of the codestream in a JP2 file (T.800 I.5); 0 for other data.

    Walks the boxes, because a comment may contain bytes that look like the header of a small picture.

    Raises:
        ValueError: a box has no length. pydicom's own search for the codestream would never end.
    """
    if data[4:8] != b"jP  ":
        return 0
    position = 0
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"jp2c":
            return position + 8
        if length < 8:
            raise ValueError("a box of the JPEG 2000 file has no length")
        position += length
    return 0
