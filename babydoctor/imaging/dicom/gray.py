"""A gray DICOM frame: stored values -> values in the modality's units -> uint8 under a window or VOI LUT.

The web UI's canvas takes the values from here too (``raw_frame``) and does the last step in the browser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from babydoctor.imaging.dicom.image import DicomImage
from babydoctor.imaging.dicom.lut import LookupTable, read_table, unit_values
from babydoctor.imaging.dicom.values import items, padding_range, places, rescale, text, windows
from babydoctor.imaging.windows import Window, apply_window, window_label, window_of_values


@dataclass(frozen=True)
class GrayFrame:
    """One decoded frame. Integers of up to 16 bits use a table, which is fast and needs no float per pixel.

    With a table, ``values`` ``[levels]`` holds the value of each stored number from ``lowest`` on, and ``counts``
    ``[levels]`` how often it occurs. Without one (``lowest`` and ``counts`` are None), ``values`` is
    ``[rows, columns]``. ``stored`` is ``[rows, columns]`` as in the file. ``padding`` is bool ``[rows, columns]``, True
    where the scanner saw nothing, or None.
    """

    dicom: DicomImage
    frame: int
    stored: np.ndarray
    padding: np.ndarray | None
    lowest: int | None
    values: np.ndarray
    counts: np.ndarray | None
    is_identity: bool

    @property
    def is_inverse(self) -> bool:
        """True if MONOCHROME1 or the presentation LUT shape, or both, ask to invert the image."""
        shape = text(self.dicom.dataset, "PresentationLUTShape").upper()
        return self.dicom.photometric == "MONOCHROME1" or shape == "INVERSE"

    @property
    def offsets(self) -> np.ndarray:
        """Each pixel's position in the table, ``[rows, columns]``. Requires a table."""
        assert self.lowest is not None
        if self.lowest == 0:
            return self.stored
        if abs(self.lowest) < 2**30:
            return self.stored.astype(np.int32) - np.int32(self.lowest)
        return self.stored.astype(np.int64) - self.lowest

    def own_window(self) -> Window | LookupTable:
        """The file's first window or VOI LUT (with entries from 0 to 1), or a window computed from the values."""
        own = windows(self.dicom.dataset, self.frame)
        if own:
            return own[0]
        for place in places(self.dicom.dataset, self.frame, "FrameVOILUTSequence"):
            for lut in items(place, "VOILUTSequence")[:1]:
                can_be_negative = bool(self.values.size and np.nanmin(self.values) < 0)
                table = _table(self.dicom, lut, can_be_negative=can_be_negative)
                label = f"VOI LUT {window_label(text(lut, 'LUTExplanation'))}".strip()
                return LookupTable(table.first, unit_values(table), table.bits, label)
        layout = self.dicom.layout
        if self.is_identity and layout.bits_stored <= 8 and not layout.is_signed and not layout.is_float:
            top = 2.0**layout.bits_stored - 1
            return Window(top / 2, top, f"{layout.bits_stored}-bit values as stored", "LINEAR_EXACT")
        counted = self.values if self.padding is None or self.counts is not None else self.values[~self.padding]
        return window_of_values(counted, counts=self.counts)

    def shown(self, chosen: Window | None) -> tuple[np.ndarray, str]:
        """``values`` as uint8 of the same shape, and a description of the window: ``chosen`` or the frame's own."""
        window = chosen or self.own_window()
        if isinstance(window, LookupTable):
            unit, explanation = window.look_up(self.values), window.explanation
        else:
            unit = apply_window(self.values, window)
            explanation = f"center {window.center:g}, width {window.width:g} ({window.explanation})"
        if self.is_inverse:
            unit = 1 - unit
        if self.values.dtype.kind == "f":
            unit = np.where(np.isnan(self.values), 0.0, unit)  # NaN is black, even if low values are white
        return (np.clip(unit, 0, 1) * 255).round().astype(np.uint8), explanation

    def spread(self, shown: np.ndarray) -> np.ndarray:
        """Convert the result of ``shown`` to the picture, uint8 ``[rows, columns]``."""
        gray = shown if self.lowest is None else shown[self.offsets]
        if self.padding is not None:
            gray[self.padding] = 0  # padding is black, even if low values are white
        return gray


def read_gray(
    dicom: DicomImage, stored: np.ndarray, cells: np.ndarray | None, frame: int, warnings: list[str]
) -> GrayFrame:
    """Convert a decoded frame (see ``pixels.decode_frame``) to the modality's units."""
    padding = _padding_mask(dicom, stored, cells)
    if stored.dtype.kind == "f" or (stored.dtype.itemsize > 2 and int(np.ptp(stored)) > 0xFFFF):
        levels, counts, lowest = stored, None, None
    else:
        lowest = int(stored.min())
        levels = np.arange(lowest, int(stored.max()) + 1)
        seen = stored if padding is None else stored[~padding]
        counts = _histogram(seen, lowest, len(levels))
    values, is_identity = _modality_values(dicom, levels, frame, warnings)
    return GrayFrame(dicom, frame, stored, padding, lowest, values, counts, is_identity)


def _histogram(seen: np.ndarray, lowest: int, size: int) -> np.ndarray:
    """Count each value from ``lowest`` on, in blocks, because ``np.bincount`` widens every value to 64 bits."""
    flat, counts = seen.ravel(), np.zeros(size, np.int64)
    for start in range(0, flat.size, 1 << 20):
        counts += np.bincount(flat[start : start + (1 << 20)].astype(np.int64) - lowest, minlength=size)
    return counts


def _padding_mask(dicom: DicomImage, stored: np.ndarray, cells: np.ndarray | None) -> np.ndarray | None:
    """True where the scanner saw nothing, bool ``[rows, columns]``; None if the file has no padding value."""
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
    """Stored values in the modality's units, and True if the file does not change them."""
    for item in items(dicom.dataset, "ModalityLUTSequence")[:1]:
        return _table(dicom, item, can_be_negative=bool(dicom.layout.is_signed)).look_up(levels).astype(float), False
    slope, intercept = rescale(dicom.dataset, frame, warnings)
    if (slope, intercept) == (1.0, 0.0):
        return levels, True
    return levels.astype(np.float64) * slope + intercept, False


def _table(dicom: DicomImage, item: object, *, can_be_negative: bool) -> LookupTable:
    big_endian = dicom.layout.is_big_endian
    return read_table(item, dicom.name, can_be_negative=can_be_negative, is_big_endian=big_endian)
