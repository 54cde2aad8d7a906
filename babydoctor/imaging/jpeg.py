"""JPEG files without what is not the picture: EXIF, comments, thumbnails, profiles, bytes behind the end."""

from __future__ import annotations

_KEPT_APPS = (0xE0, 0xEE)  # JFIF, and Adobe's, which says how colors are stored
_STANDALONE = (0x01, *range(0xD0, 0xD8))  # TEM, restart markers


def without_metadata(data: bytes) -> bytes | None:
    """The same picture, its coded data untouched, without metadata (ITU-T T.81 B.1 to B.2).

    None where the metadata turns the picture or the file is not as the standard says: then only the decoded pixels are
    safe to pass on.
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
            # JFIF may end in a thumbnail: only the fixed part stays. It is 18 bytes long, Adobe's 16.
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
    """Where the next marker stands that is not part of a scan's coded data."""
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 1 >= len(data):
            return len(data)
        if data[position + 1] == 0 or data[position + 1] in _STANDALONE:
            position += 2
        else:
            return position


def _is_upright(exif: bytes) -> bool:
    """Whether a segment of EXIF says nothing about turning the picture; False where it cannot be read."""
    from PIL import Image

    try:
        found = Image.Exif()
        found.load(exif[4:])
        return found.get(0x0112, 1) == 1
    except Exception:  # Pillow raises nearly anything on damaged data
        return False
