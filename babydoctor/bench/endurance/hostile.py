"""Small files that take a decoder minutes or gigabytes, or crash it. Used by ``bench chaos`` and the tests."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

_J2K = "1.2.840.10008.1.2.4.91"
_DEFLATED = "1.2.840.10008.1.2.1.99"


def hostile_files() -> dict[str, bytes]:
    """The files by name. All are small, and none may affect more than its own request."""
    return {
        "jp2 box of length 0": jp2_loop(),
        "decoy SIZ marker": decoy_siz(),
        "deflated zeros": deflated_zeros(),
        "progressive scans": progressive_scans(),
        "PNG of 49 megapixels": png_bomb(7000),
        "truncated PNG": png_bomb(1000)[:500],
    }


def jp2_loop() -> bytes:
    """A JP2 box of length 0, at which pydicom's search for the codestream never advances."""
    signature = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
    return _dicom(_J2K, signature + bytes(4) + b"ftyp" + bytes(20))


def decoy_siz(edge: int = 13_000) -> bytes:
    """A codestream of ``edge`` x ``edge`` pixels after a comment box with a header of 16 x 16 pixels."""
    decoy = b"\xff\x4f" + _siz(16)
    real = b"\xff\x4f" + _siz(edge) + _cod() + b"\xff\x90\x00\x0a\0\0\0\0\0\0\0\1\xff\x93" + bytes(64) + b"\xff\xd9"
    boxes = (
        b"\x00\x00\x00\x0cjP  \r\n\x87\n"
        + _box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
        + _box(b"uuid", bytes(16) + decoy)
        + _box(
            b"jp2h",
            _box(b"ihdr", struct.pack(">IIHBBBB", edge, edge, 1, 7, 7, 0, 0)) + _box(b"colr", b"\1\0\0\0\0\0\x11"),
        )
        + _box(b"jp2c", real)
    )
    return _dicom(_J2K, boxes, Rows=16, Columns=16)


def deflated_zeros(num_bytes: int = 50 * 2**20) -> bytes:
    """A deflated DICOM file of about 50 kB whose data set inflates to ``num_bytes``."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = struct.pack("<HH2sHI", 0x0009, 0x0010, b"OB", 0, num_bytes)
    data = packer.compress(head) + b"".join(packer.compress(bytes(2**20)) for _ in range(num_bytes // 2**20))
    return _meta(_DEFLATED) + data + packer.flush()


def progressive_scans(edge: int = 2000, num_scans: int = 2000) -> bytes:
    """A progressive JPEG with a repeated last scan. For each scan the decoder processes the whole picture."""
    file = io.BytesIO()
    Image.new("L", (edge, edge)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num_scans + data[-2:]


def png_bomb(edge: int) -> bytes:
    """A black PNG of ``edge`` x ``edge`` pixels in a few kilobytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * edge)
    data = b"".join(packer.compress(row) for _ in range(edge)) + packer.flush()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    )
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def _siz(edge: int) -> bytes:
    return b"\xff\x51" + struct.pack(">HHIIIIIIIIHBBB", 41, 0, edge, edge, 0, 0, edge, edge, 0, 0, 1, 7, 1, 1)


def _cod() -> bytes:
    coding = b"\xff\x52\x00\x0c\0\0\0\1\0\0\4\4\0\1"
    return coding + b"\xff\x5c\x00\x04\x40\x40"


def _meta(syntax: str) -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    element = struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(element)) + element


def _dicom(syntax: str, frame: bytes, **attributes: Any) -> bytes:
    """A DICOM file of one compressed gray frame, as short as it can be."""
    from pydicom.dataset import Dataset
    from pydicom.filewriter import dcmwrite

    dataset = Dataset()
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = attributes.get("Rows", 16), attributes.get("Columns", 16)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    even = frame + b"\0" * (len(frame) % 2)
    items = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0" + struct.pack("<I", len(even)) + even
    dataset.add_new("PixelData", "OB", items)
    dataset["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    dcmwrite(file, dataset, implicit_vr=False, little_endian=True)
    return _meta(syntax) + file.getvalue()
