"""Windows: the values of a gray image that are shown between black and white. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

WindowFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


@dataclass(frozen=True)
class Window:
    """The values that are shown between black and white, in the units after the modality LUT (HU for CT).

    ``explanation`` says where it comes from. ``function`` is the standard's VOI LUT function (PS3.3 C.11.2.1.3).
    """

    center: float
    width: float
    explanation: str = ""
    function: WindowFunction = "LINEAR"


CT_PRESETS: dict[str, Window] = {
    "soft-tissue": Window(40, 400, "CT soft tissue"),
    "lung": Window(-600, 1500, "CT lung"),
    "liver": Window(90, 150, "CT liver"),
    "bone": Window(480, 2500, "CT bone"),
    "brain": Window(40, 80, "CT brain"),
}
"""Customary level and width, in Hounsfield units."""


_LABEL_WORDS = """
    WINDOW WIN W WL NORMAL DEFAULT STANDARD HARDER HARD SOFTER SOFT TISSUE TISSUES LUNG LUNGS BONE BONES BRAIN HEAD
    NECK CHEST THORAX ABDOMEN ABDOMINAL PELVIS PELVIC LIVER SPINE MEDIASTINUM MEDIASTINAL STROKE SUBDURAL TEMPORAL
    ANGIO VESSEL VESSELS HEART CARDIAC KIDNEY EXTREMITY SKELETON BREAST MAMMO DENSE SKIN METAL FAT WATER MUSCLE
    CONTRAST CT MR MRI US XR CR DX MG NM PET LINEAR SIGMOID FULL RANGE AUTO USER DICOM VOI LUT HIGH LOW MEDIUM NARROW
    WIDE WINDOW1 WINDOW2 WINDOW3 WINDOW4 ALGO1 ALGO2 PRESET HU
"""


def window_label(text: str) -> str:
    """A file's name for a window if it consists of known words, else empty, because free text may name a person."""
    known = _LABEL_WORDS.split()
    words = re.findall(r"[^\s_\-/,.:()]+", text.upper())
    is_plain = all(word in known or (word.isdecimal() and len(word) <= 2) for word in words)
    return " ".join(text.split())[:64] if is_plain else ""


def apply_window(values: np.ndarray, window: Window) -> np.ndarray:
    """Values -> 0 (black) to 1 (white), PS3.3 C.11.2.1.2 and C.11.2.1.3. NaN is black.

    ``LINEAR`` is defined for widths of 1 and more; narrower windows are applied as ``LINEAR_EXACT``.
    """
    x = np.nan_to_num(values.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    if window.function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - window.center) / window.width, -60, 60)))
    if window.function == "LINEAR_EXACT" or window.width < 1:
        return np.clip((x - window.center) / window.width + 0.5, 0, 1)
    if window.width == 1:
        return (x > window.center - 0.5).astype(np.float64)
    return np.clip((x - (window.center - 0.5)) / (window.width - 1) + 0.5, 0, 1)


def window_of_values(seen: np.ndarray, what: str = "frame", counts: np.ndarray | None = None) -> Window:
    """A window for pixels without one: percentiles 0.5 to 99.5, so that a few marker pixels have no effect.

    ``seen`` holds the values of all pixels to consider, in any shape; with ``counts``, it holds each value once, and
    ``counts`` how often it occurs. ``what`` is used in the explanation.
    """
    seen = seen.ravel()
    if counts is not None:
        seen, counts = seen[counts > 0], counts[counts > 0]
    if seen.dtype.kind == "f":
        seen = seen[np.isfinite(seen)]
    if seen.size == 0:
        return Window(0.5, 1, f"empty {what}", "LINEAR_EXACT")
    low, high = _percentiles(seen, counts)
    explanation = f"percentiles 0.5 to 99.5 of the {what}; the file has no window"
    if high <= low:
        low, high = float(seen.min()), float(seen.max())
        explanation = f"minimum to maximum of the {what}; the file has no window"
    return Window(low / 2 + high / 2, max(high - low, 1e-12), explanation, "LINEAR_EXACT")


def _percentiles(values: np.ndarray, counts: np.ndarray | None) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5, interpolated as ``np.percentile`` does."""
    if counts is None:
        low, high = np.percentile(values, [0.5, 99.5])
        return float(low), float(high)
    order = np.argsort(values, kind="stable")
    ordered, ends = values[order].astype(np.float64), np.cumsum(counts[order])
    ranks = np.array([0.005, 0.995]) * (ends[-1] - 1)
    below, above = (ordered[np.searchsorted(ends, rank, "right")] for rank in (np.floor(ranks), np.ceil(ranks)))
    low, high = below + (above - below) * (ranks - np.floor(ranks))
    return float(low), float(high)
