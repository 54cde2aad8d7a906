"""Lookup tables of DICOM files: modality LUT, VOI LUT and palettes (PS3.3 C.11.1, C.11.2, C.7.6.3.1.5 and .6).

Color frames are converted to RGB here, through their palette if they have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom.image import DicomImage
from babydoctor.imaging.dicom.values import numbers, text
from babydoctor.imaging.limits import ImageError

_MAX_ENTRIES = 65536


@dataclass(frozen=True)
class LookupTable:
    """Maps input ``first + i`` to ``entries[i]``. Inputs beyond the ends get the first or last entry."""

    first: int
    entries: np.ndarray
    bits: int
    explanation: str = ""

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Entries for ``values`` of any shape; fractions are truncated, as in other viewers."""
        index = np.floor(values + 1e-6) if values.dtype.kind == "f" else values.astype(np.int64)
        return self.entries[np.clip(index - self.first, 0, len(self.entries) - 1).astype(np.int64)]


def read_table(
    item: Any, name: str, *, can_be_negative: bool, is_big_endian: bool, prefix: str = "LUT", segmented: str = ""
) -> LookupTable:
    """Read ``<prefix>Descriptor`` and ``<prefix>Data``.

    Args:
        can_be_negative: True if inputs may be negative, so that a first input of 32768 or more is read as negative.
        segmented: keyword of segmented data that may replace the plain data.

    Raises:
        ImageError: the table is missing, empty or contradicts itself.
    """
    descriptor = numbers(item, f"{prefix}Descriptor")
    if len(descriptor) != 3 or not np.isfinite(descriptor).all():
        raise ImageError(f"{name}: {prefix}Descriptor must hold three numbers, not {descriptor}", "dicom_unreadable")
    count = int(descriptor[0]) % 65536 or _MAX_ENTRIES
    first = int(descriptor[1])
    if can_be_negative and first >= 32768:
        first -= 65536
    elif not can_be_negative and first < 0 and first + count <= 0:
        first += 65536
    bits = int(descriptor[2])
    if segmented and not _has_value(item, f"{prefix}Data"):
        words = _words(item, segmented, is_big_endian)
        entries = _expand_segments(words, name)[:count]
    else:
        entries = _entries(item, f"{prefix}Data", count, bits, is_big_endian)[:count]
    if entries.size == 0:
        raise ImageError(f"{name}: {prefix}Data is missing or empty", "dicom_unreadable")
    if entries.size < count:
        raise ImageError(f"{name}: {prefix}Data holds {entries.size} of {count} entries", "dicom_unreadable")
    return LookupTable(first, entries, bits)


def _has_value(item: Any, keyword: str) -> bool:
    return keyword in item and item[keyword].value not in (None, b"", "", [])


def _entries(item: Any, keyword: str, count: int, bits: int, is_big_endian: bool) -> np.ndarray:
    """The entries of a table. Two 8-bit entries may share a word, the first one in its low byte."""
    if not _has_value(item, keyword):
        return np.zeros(0, np.int64)
    words = _words(item, keyword, is_big_endian)
    if words.size < count and bits <= 8:
        return np.stack([words & 0xFF, words >> 8], axis=-1).ravel()
    return words


def _words(item: Any, keyword: str, is_big_endian: bool) -> np.ndarray:
    """An element's 16-bit words as int64 from 0 to 65535."""
    value = item[keyword].value
    if isinstance(value, (bytes, bytearray)):
        padded = bytes(value) + b"\0" * (len(value) % 2)
        return np.frombuffer(padded, ">u2" if is_big_endian else "<u2").astype(np.int64)
    values = [value] if not hasattr(value, "__iter__") else list(value)
    return np.array([int(entry) & 0xFFFF for entry in values], np.int64)


def _expand_segments(words: np.ndarray, name: str) -> np.ndarray:
    """Segmented palette data -> entries, PS3.3 C.7.9.2."""
    out: list[int] = []
    _expand(words.tolist(), out, name, depth=0)
    return np.array(out, np.int64)


def _expand(words: list[int], out: list[int], name: str, depth: int, limit: int = _MAX_ENTRIES) -> None:
    position, done = 0, 0
    while position + 1 < len(words) and done < limit and len(out) <= _MAX_ENTRIES:
        opcode, length = words[position], words[position + 1]
        if opcode == 0:
            out += words[position + 2 : position + 2 + length]
            position += 2 + length
        elif opcode == 1 and out and position + 2 < len(words):
            start, end = out[-1], words[position + 2]
            out += [round(start + (end - start) * step / length) for step in range(1, length + 1)]
            position += 3
        elif opcode == 2 and depth == 0 and position + 3 < len(words):
            offset = (words[position + 2] + (words[position + 3] << 16)) // 2
            _expand(words[offset:], out, name, depth=1, limit=length)
            position += 4
        else:
            raise ImageError(f"{name}: the segmented palette is damaged at word {position}", "dicom_unreadable")
        done += 1


def unit_values(table: LookupTable) -> np.ndarray:
    """The entries of a VOI LUT, scaled to 0 to 1. The descriptor may understate the number of bits."""
    bits = table.bits if 1 <= table.bits <= 16 else 16
    top = 2.0**bits - 1
    largest = int(table.entries.max())
    if largest > top:
        top = 2.0 ** max(bits, largest.bit_length()) - 1
    return table.entries / top


def to_color(dicom: DicomImage, values: np.ndarray, warnings: list[str]) -> np.ndarray:
    """Stored values of a color frame -> uint8 ``[rows, columns, 3]``."""
    layout = dicom.layout
    if layout.photometric == "PALETTE COLOR":
        return _read_palette(dicom, warnings).look_up(values)
    if values.ndim != 3 or values.shape[2] != 3:
        raise ImageError(f"{dicom.name}: decodes to {values.shape}, not to three colors", "dicom_unreadable")
    if layout.bits_stored != 8:
        values = (values.astype(np.float32) * np.float32(255 / (2.0**layout.bits_stored - 1))).round().clip(0, 255)
    return np.ascontiguousarray(values.astype(np.uint8))


def supplemental_palette(dicom: DicomImage, warnings: list[str]) -> LookupTable | None:
    """The palette of a gray image, for stored values from its first entry on; None if it has none to apply."""
    if "RedPaletteColorLookupTableDescriptor" not in dicom.dataset:
        return None
    if text(dicom.dataset, "PixelPresentation").upper() not in ("COLOR", "MIXED"):
        warnings.append("the file has a palette that its gray image does not use; shown in gray")
        return None
    return _read_palette(dicom, warnings)


def supplemental_colors(dicom: DicomImage, image: Image.Image, stored: np.ndarray, warnings: list[str]) -> Image.Image:
    """Color the values that a supplemental palette covers (PS3.3 C.7.6.19); the others stay gray."""
    palette = supplemental_palette(dicom, warnings)
    if palette is None:
        return image
    colored = stored >= palette.first
    shown = np.asarray(image).copy()
    shown[colored] = palette.look_up(stored[colored])
    return Image.fromarray(shown)


def _read_palette(dicom: DicomImage, warnings: list[str]) -> LookupTable:
    """The three palettes as one table whose entries are uint8 ``[n, 3]``."""
    dataset, tables = dicom.dataset, []
    for color in ("Red", "Green", "Blue"):
        prefix = f"{color}PaletteColorLookupTable"
        if f"{prefix}Descriptor" not in dataset:
            uid = dataset.get("PaletteColorLookupTableUID")
            what = f"the file only refers to palette {uid}" if uid else f"the file has no {color.lower()} palette"
            raise ImageError(f"{dicom.name}: needs a palette, but {what}", "dicom_unsupported")
        tables.append(
            read_table(
                dataset,
                dicom.name,
                can_be_negative=bool(dicom.layout.is_signed),
                is_big_endian=dicom.layout.is_big_endian,
                prefix=prefix,
                segmented=f"Segmented{prefix}Data",
            )
        )
    if len({(table.first, len(table.entries)) for table in tables}) != 1:
        raise ImageError(f"{dicom.name}: the three palettes differ in length or first value", "dicom_unreadable")
    entries = np.stack([table.entries for table in tables], axis=-1)  # [n, 3]
    bits = tables[0].bits if 1 <= tables[0].bits <= 16 else 16
    largest = int(entries.max())
    if bits > 8 and 0 < largest <= 255 and len(entries) > 1:
        warnings.append(f"the palette says {bits} bits but holds 8-bit entries; read as 8 bits")
        bits = 8
    elif largest >= 2**bits:
        bits = 16
    shown = entries >> (bits - 8) if bits > 8 else entries * 255 // (2**bits - 1)
    return LookupTable(tables[0].first, shown.astype(np.uint8), 8)
