"""DICOM -> RGB, in the standard's order (PS3.3 C.11, PS3.4 N.2): modality LUT, VOI LUT or window, presentation LUT.

``dicom_file`` parses, ``dicom_header`` decides how pixels are stored, ``dicom_pixels`` decodes a frame,
``dicom_values`` and ``dicom_lut`` read what the steps below need. Free of torch; pydicom is imported where it is used,
because that takes a third of a second.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom_file import is_dicom, parse_file
from babydoctor.imaging.dicom_header import read_layout
from babydoctor.imaging.dicom_image import IDENTIFYING_TAGS, DicomImage, harmless_facts, identifying_tags
from babydoctor.imaging.dicom_lut import LookupTable, read_table, supplemental_colors, to_color, unit_values
from babydoctor.imaging.dicom_pixels import decode_frame
from babydoctor.imaging.dicom_safety import reading_values
from babydoctor.imaging.dicom_values import (
    code,
    items,
    padding_range,
    pixel_shape,
    pixel_spacing,
    places,
    rescale,
    text,
    windows,
)
from babydoctor.imaging.limits import MAX_PIXELS, ImageError, check_size
from babydoctor.imaging.windows import CT_PRESETS, Window, apply_window, window_label, window_of_values

__all__ = [
    "CT_PRESETS",
    "IDENTIFYING_TAGS",
    "DicomImage",
    "harmless_facts",
    "identifying_tags",
    "is_dicom",
    "read_dicom",
    "render",
]


def read_dicom(source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> DicomImage:
    """Read the header of a DICOM image; ``name`` stands for the file in messages when ``source`` is bytes.

    Raises:
        ImageError: it is not DICOM, holds no image, is of an unsupported kind, or a frame has more than
            ``max_pixels`` pixels.
    """
    if isinstance(source, bytes):
        name, data = name or f"DICOM of {len(source)} bytes", source
    else:
        name = name or str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror})", "image_missing") from error
    with reading_values(name):
        file = parse_file(data, name, max_pixels)
        layout, assumed = read_layout(file, name, max_pixels)
        warnings = list(assumed)
        return DicomImage(
            name=name,
            layout=layout,
            modality=code(file.dataset, "Modality"),
            pixel_spacing=pixel_spacing(file.dataset, 0),
            windows=windows(file.dataset, 0, warnings),
            warnings=tuple(dict.fromkeys(warnings)),
            dataset=file.dataset,
            data=data,
        )


def render(
    dicom: DicomImage,
    frame: int = 0,
    center: float | None = None,
    width: float | None = None,
    preset: str | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    square_pixels: bool = True,
) -> Image.Image:
    """One frame as an RGB picture. If pixels are not square, it is stretched so that they become square.

    Gray frames are shown under ``center`` and ``width``, or the CT ``preset``, or the file's first window or VOI
    LUT, or else a window made from the frame's own values. ``image.info["window"]`` says which, and
    ``image.info["warnings"]`` what was unclear in the file and how it was interpreted.

    Raises:
        ImageError: the frame, window or preset does not exist, or the pixels cannot be decoded.
    """
    with reading_values(dicom.name):
        image, warnings = _render(dicom, frame, _chosen_window(dicom, center, width, preset))
        explanation = image.info["window"]
        if square_pixels:
            image = _square_pixels(dicom, frame, image, warnings, max_pixels)
        image.info["window"] = explanation
        image.info["warnings"] = tuple(dict.fromkeys(warnings))
        return image


def _render(dicom: DicomImage, frame: int, chosen: Window | None) -> tuple[Image.Image, list[str]]:
    """One frame with the file's own pixels, and the warnings about it."""
    warnings = list(dicom.warnings)
    if not dicom.is_grey and chosen is not None:
        raise ImageError(
            f"{dicom.name}: a color image ({dicom.photometric}) has no window; leave it out", "invalid_input"
        )
    values, cells = decode_frame(dicom, frame, warnings)
    if dicom.is_grey:
        grey, explanation = _to_grey(dicom, values, cells, frame, chosen, warnings)
        image = Image.fromarray(grey).convert("RGB")
        image = supplemental_colors(dicom, image, values, warnings)
    else:
        image, explanation = Image.fromarray(to_color(dicom, values, warnings)), "color, as stored"
    image.info["window"] = explanation
    return image, warnings


def _chosen_window(dicom: DicomImage, center: float | None, width: float | None, preset: str | None) -> Window | None:
    if preset is not None:
        if preset not in CT_PRESETS:
            raise ImageError(f"window preset {preset!r}: must be one of {', '.join(CT_PRESETS)}", "invalid_input")
        if dicom.modality != "CT":
            raise ImageError(
                f"{dicom.name}: preset {preset!r} is for CT, this is {dicom.modality or 'unknown'}", "invalid_input"
            )
        if center is not None or width is not None:
            raise ImageError(f"give either the preset {preset!r} or a center and a width, not both", "invalid_input")
        return CT_PRESETS[preset]
    if (center is None) != (width is None):
        raise ImageError(f"window center {center} and width {width}: give both or neither", "invalid_input")
    if center is None or width is None:
        return None
    if not (np.isfinite(center) and np.isfinite(width) and width > 0):
        raise ImageError(
            f"window center {center} and width {width}: the width must be above 0, usually at least 1", "invalid_input"
        )
    return Window(float(center), float(width), "chosen")


def _to_grey(
    dicom: DicomImage,
    stored: np.ndarray,
    cells: np.ndarray | None,
    frame: int,
    chosen: Window | None,
    warnings: list[str],
) -> tuple[np.ndarray, str]:
    """Stored values -> uint8 ``[rows, columns]``, and how they were windowed.

    Integers of up to 16 bits are mapped through a table of all values. This is fast and needs no float per pixel.
    """
    padding = _padding_mask(dicom, stored, cells)
    if stored.dtype.kind == "f" or (stored.dtype.itemsize > 2 and int(np.ptp(stored)) > 0xFFFF):
        levels, counts, lowest = stored, None, None
    else:
        lowest = int(stored.min())
        levels = np.arange(lowest, int(stored.max()) + 1)
        seen = stored if padding is None else stored[~padding]
        counts = _histogram(seen, lowest, len(levels))
    values, is_identity = _modality_values(dicom, levels, frame, warnings)
    counted = values if padding is None or counts is not None else values[~padding]
    unit, explanation = _voi(dicom, values, counted, counts, frame, chosen, is_identity=is_identity)
    if _is_inverse(dicom):
        unit = 1 - unit
    if values.dtype.kind == "f":
        unit = np.where(np.isnan(values), 0.0, unit)  # no value: black, also where low values are white
    shown = (np.clip(unit, 0, 1) * 255).round().astype(np.uint8)
    grey = shown if lowest is None else shown[_offsets(stored, lowest)]
    if padding is not None:
        grey[padding] = 0  # padding is background, also where low values are white
    return grey, explanation


def _offsets(stored: np.ndarray, lowest: int) -> np.ndarray:
    """Indices into a table that begins at the value ``lowest``."""
    if lowest == 0:
        return stored
    return stored.astype(np.int32) - np.int32(lowest) if abs(lowest) < 2**30 else stored.astype(np.int64) - lowest


def _histogram(seen: np.ndarray, lowest: int, size: int) -> np.ndarray:
    """Count each value from ``lowest`` on, in pieces, because counting widens every value to 64 bits."""
    flat, counts = seen.ravel(), np.zeros(size, np.int64)
    for start in range(0, flat.size, 1 << 20):
        counts += np.bincount(flat[start : start + (1 << 20)].astype(np.int64) - lowest, minlength=size)
    return counts


def _padding_mask(dicom: DicomImage, stored: np.ndarray, cells: np.ndarray | None) -> np.ndarray | None:
    """Mask of padding pixels, ``[rows, columns]``; None if the file defines no padding value."""
    layout = dicom.layout
    is_signed = None if layout.is_float else bool(layout.is_signed)
    between = padding_range(dicom.dataset, layout.bits_allocated, is_signed)
    if between is None:
        return None
    mask = (stored >= between[0]) & (stored <= between[1])
    if cells is not None:
        whole = cells.view(f"i{cells.dtype.itemsize}") if is_signed else cells
        mask |= (whole >= between[0]) & (whole <= between[1])
    return mask


def _modality_values(dicom: DicomImage, levels: np.ndarray, frame: int, warnings: list[str]) -> tuple[np.ndarray, bool]:
    """Stored values -> the units of the modality, and True if the file changes nothing."""
    for item in items(dicom.dataset, "ModalityLUTSequence")[:1]:
        return _table(dicom, item, can_be_negative=bool(dicom.layout.is_signed)).look_up(levels).astype(float), False
    slope, intercept = rescale(dicom.dataset, frame, warnings)
    if (slope, intercept) == (1.0, 0.0):
        return levels, True
    return levels.astype(np.float64) * slope + intercept, False


def _table(dicom: DicomImage, item: object, *, can_be_negative: bool) -> LookupTable:
    big_endian = dicom.layout.is_big_endian
    return read_table(item, dicom.name, can_be_negative=can_be_negative, is_big_endian=big_endian)


def _voi(
    dicom: DicomImage,
    values: np.ndarray,
    counted: np.ndarray,
    counts: np.ndarray | None,
    frame: int,
    chosen: Window | None,
    *,
    is_identity: bool,
) -> tuple[np.ndarray, str]:
    """Values -> 0 to 1 by window or VOI LUT, and which one. ``counts`` are the weights of a table ``counted``."""
    own = windows(dicom.dataset, frame)
    window = chosen or (own[0] if own else None)
    if window is None:
        for place in places(dicom.dataset, frame, "FrameVOILUTSequence"):
            for lut in items(place, "VOILUTSequence")[:1]:
                table = _table(dicom, lut, can_be_negative=bool(values.size and np.nanmin(values) < 0))
                unit = unit_values(table)
                shown = LookupTable(table.first, unit, table.bits).look_up(values)
                return shown, f"VOI LUT {window_label(text(lut, 'LUTExplanation'))}".strip()
        bits = dicom.layout.bits_stored
        if is_identity and bits <= 8 and not dicom.layout.is_signed and not dicom.layout.is_float:
            top = 2.0**bits - 1
            window = Window(top / 2, top, f"{bits}-bit values as stored", "LINEAR_EXACT")
        else:
            window = window_of_values(counted, counts=counts)
    explanation = f"center {window.center:g}, width {window.width:g} ({window.explanation})"
    return apply_window(values, window), explanation


def _is_inverse(dicom: DicomImage) -> bool:
    """MONOCHROME1 means inverted, and so does the presentation LUT shape INVERSE. Both together invert once."""
    return dicom.photometric == "MONOCHROME1" or text(dicom.dataset, "PresentationLUTShape").upper() == "INVERSE"


def _square_pixels(
    dicom: DicomImage, frame: int, image: Image.Image, warnings: list[str], max_pixels: int
) -> Image.Image:
    """Stretch the axis with the larger spacing, or a reformatted CT with 3 mm slices would look squashed."""
    vertical, horizontal = pixel_shape(dicom.dataset, frame, warnings)
    if abs(vertical / horizontal - 1) < 0.01:
        return image
    finest = min(vertical, horizontal)
    size = (round(image.width * horizontal / finest), round(image.height * vertical / finest))
    try:
        check_size(*size, f"{dicom.name} with square pixels", max_pixels)
    except ImageError:
        warnings.append(f"with square pixels the picture would have {size[0]} x {size[1]}; it is shown unstretched")
        return image
    return image.resize(size, Image.Resampling.BILINEAR)
