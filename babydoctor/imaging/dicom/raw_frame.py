"""A frame without a window, as a block of bytes for the web UI's canvas, which applies windows in the browser.

Layout, little-endian: the length of the header (uint32), the header (JSON, padded with spaces so that the arrays begin
at a multiple of 8 bytes), then the arrays, which depend on ``kind``:

- ``gray``: ``values`` float64 ``[levels]`` in the modality's units, NaN for "always black"; ``index`` uint16
  ``[rows, columns]``, each pixel's position in ``values``; ``shown`` uint8 ``[levels]``, the gray under the file's own
  window; ``colors`` uint8 ``[colored, 3]``, fixed colors of the last ``colored`` levels before that of padding.
- ``wide``: like ``gray`` without ``index``, with a level for each pixel. For floats and integers of more than 16 bits.
- ``color``: uint8 ``[rows, columns, 3]``.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom.gray import GrayFrame, read_gray
from babydoctor.imaging.dicom.image import DicomImage
from babydoctor.imaging.dicom.lut import LookupTable, supplemental_palette, to_color
from babydoctor.imaging.dicom.pixels import decode_frame
from babydoctor.imaging.dicom.safety import reading_values
from babydoctor.imaging.dicom.values import numbers, orientation, pixel_shape, pixel_spacing, places

MAX_BYTES = 40 * 2**20
"""Largest block. Of a larger frame, every ``step``-th row and column is sent; ``step`` is in the header."""

_MAX_LEVELS = 65536
_MEASURES = "PixelMeasuresSequence"


def raw_frame(dicom: DicomImage, frame: int) -> bytes:
    """One frame as a block of bytes in the layout of this module.

    Raises:
        ImageError: the frame does not exist or cannot be decoded.
    """
    with reading_values(dicom.name):
        stored, cells = decode_frame(dicom, frame, [])
        geometry = _geometry(dicom, frame)
        if not dicom.is_gray:
            return color_block(to_color(dicom, stored, []), geometry)
        return _gray_block(read_gray(dicom, stored, cells, frame, []), geometry)


def _geometry(dicom: DicomImage, frame: int) -> dict[str, Any]:
    """What rulers and orientation markers need: numbers and letters that identify nobody."""
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
    """A picture that is not from a DICOM file, as a block of bytes."""
    return color_block(np.asarray(picture.convert("RGB")))


def _gray_block(gray: GrayFrame, geometry: dict[str, Any]) -> bytes:
    values = gray.values.astype(np.float64)
    shown, _ = gray.shown(None)
    own = gray.own_window()
    center, width = _linear_window(own, values)
    header: dict[str, Any] = {"center": center, "width": width, "is_inverse": gray.is_inverse} | geometry
    if gray.lowest is None or len(values) + (gray.padding is not None) > _MAX_LEVELS:
        return _wide_block(gray, values, shown, header)
    index = gray.offsets.astype(np.uint16)
    colors = _colors(gray, len(values))
    header["first_color"] = len(values) - len(colors)
    if gray.padding is not None:
        index[gray.padding] = len(values)
        values, shown = np.append(values, np.nan), np.append(shown, np.uint8(0))
    step = _step(index.size, 2)
    index = index[::step, ::step]
    header |= {"kind": "gray", "step": step, "levels": len(values), "colored": len(colors)}
    arrays = values.tobytes() + index.tobytes() + shown.tobytes() + colors.tobytes()
    return _block(header, index.shape, arrays)


def _colors(gray: GrayFrame, num_levels: int) -> np.ndarray:
    """Fixed colors of the last levels by a supplemental palette, uint8 ``[colored, 3]``."""
    palette = supplemental_palette(gray.dicom, [])
    if palette is None or gray.lowest is None:
        return np.zeros((0, 3), np.uint8)
    first = min(max(palette.first, gray.lowest), gray.lowest + num_levels)
    return palette.look_up(np.arange(first, gray.lowest + num_levels)).astype(np.uint8)


def _wide_block(gray: GrayFrame, values: np.ndarray, shown: np.ndarray, header: dict[str, Any]) -> bytes:
    if gray.lowest is not None:
        values = values[gray.offsets]
    shown = gray.spread(shown)
    if gray.padding is not None:
        values = np.where(gray.padding, np.nan, values)
    step = _step(values.size, 9)
    values, shown = values[::step, ::step], shown[::step, ::step]
    header |= {"kind": "wide", "step": step, "levels": values.size}
    return _block(header, values.shape, values.tobytes() + shown.tobytes())


def _linear_window(own: Any, values: np.ndarray) -> tuple[float, float]:
    """Center and width where dragging starts. For a VOI LUT, the range of its inputs."""
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
