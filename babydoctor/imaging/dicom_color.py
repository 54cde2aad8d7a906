"""Color DICOM frames -> RGB: palettes, supplemental palettes and wide samples."""

from __future__ import annotations

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom_image import DicomImage
from babydoctor.imaging.dicom_lut import LookupTable, read_table
from babydoctor.imaging.dicom_values import text
from babydoctor.imaging.limits import ImageError


def to_color(dicom: DicomImage, values: np.ndarray, warnings: list[str]) -> np.ndarray:
    """Stored values of a color frame -> uint8 ``[rows, columns, 3]``."""
    layout = dicom.layout
    if layout.photometric == "PALETTE COLOR":
        return _read_palette(dicom, warnings).look_up(values)
    if values.ndim != 3 or values.shape[2] != 3:
        raise ImageError(f"{dicom.name}: decodes to {values.shape}, not to three colors", "dicom_damaged")
    if layout.bits_stored != 8:
        values = (values.astype(np.float32) * np.float32(255 / (2.0**layout.bits_stored - 1))).round().clip(0, 255)
    return np.ascontiguousarray(values.astype(np.uint8))


def supplemental_colors(dicom: DicomImage, image: Image.Image, stored: np.ndarray, warnings: list[str]) -> Image.Image:
    """Color the values that a supplemental palette covers (PS3.3 C.7.6.19); the others stay grey."""
    if "RedPaletteColorLookupTableDescriptor" not in dicom.dataset:
        return image
    if text(dicom.dataset, "PixelPresentation").upper() not in ("COLOR", "MIXED"):
        warnings.append("the file brings a palette that its grey image does not ask for; shown in grey")
        return image
    palette = _read_palette(dicom, warnings)
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
            what = f"only names the palette {uid}" if uid else f"brings no {color.lower()} palette"
            raise ImageError(f"{dicom.name}: needs a palette and {what}", "dicom_unsupported")
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
        raise ImageError(f"{dicom.name}: the three palettes differ in length or first value", "dicom_damaged")
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
