"""Strip metadata from picture files before Pillow decodes them, and read the EXIF orientation. Pure.

Damaged metadata must not make a picture unreadable, so text, profiles and EXIF are removed before the decoder sees the
file. Only the EXIF orientation is used, which a tolerant parser reads.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (PNG_MAGIC, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)

_ORIENTATION_TAG = 0x0112

# The TIFF tags that say how pixels are stored (TIFF 6.0 and its JPEG and SampleFormat extensions).
_TIFF_PIXEL_TAGS = frozenset(
    [
        *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338),
        *(339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
    ]
)


@dataclass(frozen=True)
class Container:
    """A picture file without metadata.

    ``orientation`` is EXIF's, 1 to 8. ``transparent_key`` holds the samples of PNG's tRNS chunk for gray and RGB.
    ``bit_depth`` and ``color_type`` are those of PNG's header. ``is_white_zero`` is True for TIFF's photometric
    interpretation 0, ``is_planar_wide`` for a TIFF with samples of more than 8 bits in separate planes.
    """

    format: str
    data: bytes
    orientation: int = 1
    bit_depth: int = 8
    color_type: int = -1
    transparent_key: tuple[int, ...] | None = None
    is_white_zero: bool = False
    is_planar_wide: bool = False


def picture_format(data: bytes) -> str | None:
    """``PNG``, ``JPEG``, ``GIF``, ``BMP``, ``TIFF`` or ``WEBP`` by the first bytes; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if data.startswith(magic)), None)


def clean(data: bytes, format: str) -> Container:
    """Remove the metadata of a picture. Damage is left for the decoder to report."""
    try:
        if format == "PNG":
            return _clean_png(data)
        if format == "JPEG":
            return _clean_jpeg(data)
        if format == "TIFF":
            return _clean_tiff(data)
        if format == "WEBP":
            return Container(format, data, _webp_orientation(data))
    except (struct.error, IndexError, ValueError):
        pass
    return Container(format, data)


def exif_orientation(tiff: bytes) -> int:
    """Orientation of an EXIF block (a TIFF structure); 1 if it states no valid one."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 10:
        return 1
    start = struct.unpack_from(order + "I", tiff, 4)[0]
    if start + 2 > len(tiff):
        return 1
    for index in range(struct.unpack_from(order + "H", tiff, start)[0]):
        entry = start + 2 + 12 * index
        if entry + 12 > len(tiff):
            break
        tag, kind, _ = struct.unpack_from(order + "HHI", tiff, entry)
        if tag == _ORIENTATION_TAG:
            return _orientation(tiff, order, kind, entry + 8)
    return 1


def _orientation(data: bytes, order: str, kind: int, at: int) -> int:
    code = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}.get(kind)
    value = struct.unpack_from(order + code, data, at)[0] if code else 1
    return value if 1 <= value <= 8 else 1


def _clean_png(data: bytes) -> Container:
    """Keep the critical chunks and the transparency of palettes, without checking ancillary checksums."""
    kept, position, orientation, transparency = [PNG_MAGIC], len(PNG_MAGIC), 1, b""
    depth, color_type = data[24], data[25]
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        whole = data[position : position + 12 + length]
        position += 12 + length
        if kind == b"eXIf":
            orientation = _tolerant_orientation(body.removeprefix(b"Exif\0\0"))
        elif kind in (b"zTXt", b"tEXt") and body.startswith(b"Raw profile type exif\0"):
            orientation = _tolerant_orientation(_raw_profile(kind, body))
        elif kind == b"tRNS":
            transparency = body
            if color_type == 3:
                kept.append(whole[: 8 + length] + struct.pack(">I", zlib.crc32(kind + body)))
        elif not kind[0] & 0x20:  # upper case: a critical chunk
            kept.append(whole)
        if kind == b"IEND":
            break
    channels = {0: 1, 2: 3}.get(color_type)
    key = None
    if channels and len(transparency) >= 2 * channels:
        mask = (1 << depth) - 1
        key = tuple(value & mask for value in struct.unpack_from(f">{channels}H", transparency))
    return Container("PNG", b"".join(kept), orientation, depth, color_type, key)


def _tolerant_orientation(tiff: bytes) -> int:
    try:
        return exif_orientation(tiff)
    except struct.error:
        return 1


def _raw_profile(kind: bytes, body: bytes) -> bytes:
    """The EXIF block that ImageMagick writes into a text chunk, as hexadecimal digits after a name and a length."""
    text = body.partition(b"\0")[2]
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], 1 << 18)
        return bytes.fromhex("".join(text.decode("latin-1").split()[2:])).removeprefix(b"Exif\0\0")
    except (ValueError, zlib.error):
        return b""


def _clean_jpeg(data: bytes) -> Container:
    """Drop comments and application segments, except JFIF's and Adobe's, which say how colors are stored."""
    kept, position, orientation = [data[:2]], 2, 1
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in (0xD9, 0xDA) or 0xD0 <= marker <= 0xD7 or marker == 0x01:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position:end]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            orientation = _tolerant_orientation(segment[10:])
        if not (0xE1 <= marker <= 0xEF and marker != 0xEE) and marker != 0xFE:
            kept.append(segment)
        position = end
    kept.append(data[position:])
    return Container("JPEG", b"".join(kept), orientation)


def _clean_tiff(data: bytes) -> Container:
    """Point the header at a directory that holds only the tags of the first picture's pixels."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    start = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)[0]
    count_code, entry_size, value_at = ("Q", 20, 12) if is_big else ("H", 12, 8)
    count = struct.unpack_from(order + count_code, data, start)[0]
    first = start + struct.calcsize(order + count_code)
    entries, orientation, shorts = [], 1, {258: 8, 262: 1, 277: 1, 284: 1}
    for index in range(min(count, 4096)):
        at = first + entry_size * index
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag == _ORIENTATION_TAG:
            orientation = _orientation(data, order, kind, at + value_at)
        if tag in shorts:
            shorts[tag] = _first_short(data, order, at, value_at, is_big)
        if tag in _TIFF_PIXEL_TAGS:
            entries.append(data[at : at + entry_size])
    new_start = len(data) + len(data) % 2
    header = (
        data[:8] + struct.pack(order + "Q", new_start) if is_big else data[:4] + struct.pack(order + "I", new_start)
    )
    directory = struct.pack(order + count_code, len(entries)) + b"".join(entries) + b"\0" * 8
    cleaned = header + data[len(header) :] + b"\0" * (len(data) % 2) + directory
    is_planar_wide = shorts[258] > 8 and shorts[277] > 1 and shorts[284] == 2
    return Container("TIFF", cleaned, orientation, is_white_zero=shorts[262] == 0, is_planar_wide=is_planar_wide)


def _first_short(data: bytes, order: str, entry: int, value_at: int, is_big: bool) -> int:
    """First number of an entry of type SHORT. It is in the entry itself if all numbers fit there."""
    at, count = entry + value_at, struct.unpack_from(order + ("Q" if is_big else "I"), data, entry + 4)[0]
    if 2 * count > (8 if is_big else 4):
        at = struct.unpack_from(order + ("Q" if is_big else "I"), data, at)[0]
    return int(struct.unpack_from(order + "H", data, at)[0])


def _webp_orientation(data: bytes) -> int:
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            return _tolerant_orientation(data[position + 8 : position + 8 + length].removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    return 1
