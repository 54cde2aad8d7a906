"""Remove from JPEG files all that is not the picture: EXIF, comments, thumbnails, profiles, bytes after the end."""

from __future__ import annotations

_KEPT_APPS = (0xE0, 0xEE)  # JFIF and Adobe segments, which say how colors are stored
_STANDALONE = (0x01, *range(0xD0, 0xD8))  # TEM, restart markers


def without_metadata(data: bytes) -> bytes | None:
    """Return the file without metadata, with the coded picture data unchanged (ITU-T T.81 B.1 to B.2).

    None if EXIF rotates the picture, or if the file does not follow the standard. Then only decoded pixels are safe to
    pass on.
    """
    if data[:2] != b"\xff\xd8":
        return None
    kept, position = [data[:2]], 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xD9:
            return b"".join([*kept, b"\xff\xd9"])
        if marker in _STANDALONE:
            return None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position:end]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0" and not _is_upright(segment):
            return None
        if marker == 0xDA:
            end = _end_of_scan(data, end)
            kept.append(data[position:end])
        elif marker in _KEPT_APPS:
            # A JFIF segment may end in a thumbnail, so keep only the fixed part: 18 bytes, and 16 of Adobe's.
            fixed = segment[4 : 18 if marker == 0xE0 else 16]
            if segment[4:9] == b"JFIF\0":
                fixed = fixed[:12] + b"\0\0"
            elif segment[4:9] != b"Adobe":
                fixed = b""
            if fixed:
                kept.append(bytes((0xFF, marker)) + (2 + len(fixed)).to_bytes(2, "big") + fixed)
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        position = end
    return b"".join([*kept, b"\xff\xd9"]) if data[position:] == b"\xff\xd9" else None


def _end_of_scan(data: bytes, position: int) -> int:
    """Position of the next marker that is not part of a scan's coded data."""
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 1 >= len(data):
            return len(data)
        if data[position + 1] == 0 or data[position + 1] in _STANDALONE:
            position += 2
        else:
            return position


def _is_upright(exif: bytes) -> bool:
    """True if an EXIF segment does not rotate the picture; False if it cannot be read."""
    from PIL import Image

    try:
        found = Image.Exif()
        found.load(exif[4:])
        return found.get(0x0112, 1) == 1
    except Exception:  # Pillow raises nearly anything on damaged data
        return False
