"""A frame before the window, as one block of bytes for the web UI's canvas, which windows it in the browser.

Layout, little-endian: the length of the header (uint32), the header (JSON, padded with spaces so that what follows
begins at a multiple of 8), then the arrays that ``kind`` says:

- ``grey``: ``values`` float64 ``[levels]`` in the modality's units, NaN for "always black"; ``index`` uint16
  ``[rows, columns]``, each pixel's position in ``values``; ``shown`` uint8 ``[levels]``, the gray under the file's own
  window; ``colors`` uint8 ``[colored, 3]``, fixed colors of the last ``colored`` levels before the one of padding.
- ``wide``: as ``grey`` without ``index``: a level for each pixel. For floats and for integers of more than 16 bits.
- ``color``: uint8 ``[rows, columns, 3]``.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom_image import DicomImage
from babydoctor.imaging.dicom_lut import LookupTable, supplemental_palette, to_color
from babydoctor.imaging.dicom_pixels import decode_frame
from babydoctor.imaging.dicom_safety import reading_values
from babydoctor.imaging.dicom_values import numbers, orientation, pixel_shape, pixel_spacing, places
from babydoctor.imaging.grey import GreyFrame, read_grey

MAX_BYTES = 40 * 2**20
"""Of one block. Every second, third, ... row and column of a larger frame is sent; ``step`` in the header says so."""

_MAX_LEVELS = 65536
_MEASURES = "PixelMeasuresSequence"


def raw_frame(dicom: DicomImage, frame: int) -> bytes:
    """One frame as a block of bytes, see above.

    Raises:
        ImageError: the frame does not exist or cannot be decoded.
    """
    with reading_values(dicom.name):
        stored, cells = decode_frame(dicom, frame, [])
        geometry = _geometry(dicom, frame)
        if not dicom.is_grey:
            return color_block(to_color(dicom, stored, []), geometry)
        return _grey_block(read_grey(dicom, stored, cells, frame, []), geometry)


def _geometry(dicom: DicomImage, frame: int) -> dict[str, Any]:
    """What rulers and orientation markers need: numbers and letters, nothing that identifies."""
    dataset = dicom.dataset
    return {
        "marks": orientation(dataset, frame),
        "spacing": pixel_spacing(dataset, frame),
        "at_detector": not any(numbers(item, "PixelSpacing") for item in places(dataset, frame, _MEASURES)),
        "shape": pixel_shape(dataset, frame, []),
        "unit": "HU" if dicom.modality == "CT" else "",
    }


def color_block(pixels: np.ndarray, geometry: dict[str, Any] | None = None) -> bytes:
    """A color picture, uint8 ``[rows, columns, 3]``, as a block of bytes."""
    step = _step(pixels.shape[0] * pixels.shape[1], 3)
    pixels = pixels[::step, ::step]
    return _block({"kind": "color", "step": step} | (geometry or {}), pixels.shape, pixels.astype(np.uint8).tobytes())


def picture_block(picture: Image.Image) -> bytes:
    """A picture that is no DICOM file as a block of bytes."""
    return color_block(np.asarray(picture.convert("RGB")))


def _grey_block(grey: GreyFrame, geometry: dict[str, Any]) -> bytes:
    values = grey.values.astype(np.float64)
    shown, _ = grey.shown(None)
    own = grey.own_window()
    center, width = _linear_window(own, values)
    header: dict[str, Any] = {"center": center, "width": width, "is_inverse": grey.is_inverse} | geometry
    if grey.lowest is None or len(values) + (grey.padding is not None) > _MAX_LEVELS:
        return _wide_block(grey, values, shown, header)
    index = grey.offsets.astype(np.uint16)
    colors = _colors(grey, len(values))
    header["first_color"] = len(values) - len(colors)
    if grey.padding is not None:
        index[grey.padding] = len(values)
        values, shown = np.append(values, np.nan), np.append(shown, np.uint8(0))
    step = _step(index.size, 2)
    index = index[::step, ::step]
    header |= {"kind": "grey", "step": step, "levels": len(values), "colored": len(colors)}
    arrays = values.tobytes() + index.tobytes() + shown.tobytes() + colors.tobytes()
    return _block(header, index.shape, arrays)


def _colors(grey: GreyFrame, num_levels: int) -> np.ndarray:
    """Fixed colors of the last levels by a supplemental palette, uint8 ``[colored, 3]``."""
    palette = supplemental_palette(grey.dicom, [])
    if palette is None or grey.lowest is None:
        return np.zeros((0, 3), np.uint8)
    first = min(max(palette.first, grey.lowest), grey.lowest + num_levels)
    return palette.look_up(np.arange(first, grey.lowest + num_levels)).astype(np.uint8)


def _wide_block(grey: GreyFrame, values: np.ndarray, shown: np.ndarray, header: dict[str, Any]) -> bytes:
    if grey.lowest is not None:
        values = values[grey.offsets]
    shown = grey.spread(shown)
    if grey.padding is not None:
        values = np.where(grey.padding, np.nan, values)
    step = _step(values.size, 9)
    values, shown = values[::step, ::step], shown[::step, ::step]
    header |= {"kind": "wide", "step": step, "levels": values.size}
    return _block(header, values.shape, values.tobytes() + shown.tobytes())


def _linear_window(own: Any, values: np.ndarray) -> tuple[float, float]:
    """Center and width from which a drag starts. A VOI LUT has no window, so the range of its inputs is used."""
    if not isinstance(own, LookupTable):
        return own.center, own.width
    finite = values[np.isfinite(values)]
    low = max(float(own.first), float(finite.min(initial=own.first)))
    high = min(float(own.first + len(own.entries)), float(finite.max(initial=own.first)))
    return (low + high) / 2, max(high - low, 1.0)


def _step(num_pixels: int, bytes_per_pixel: int) -> int:
    step = 1
    while num_pixels // step**2 * bytes_per_pixel > MAX_BYTES:
        step += 1
    return step


def _block(header: dict[str, Any], shape: tuple[int, ...], arrays: bytes) -> bytes:
    text = json.dumps(header | {"rows": shape[0], "columns": shape[1]}).encode()
    text += b" " * (-(4 + len(text)) % 8)
    return struct.pack("<I", len(text)) + text + arrays
