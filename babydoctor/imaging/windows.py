"""Windows: which values of a grey image are shown between black and white. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

WindowFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


@dataclass(frozen=True)
class Window:
    """Which values are shown between black and white, in the units after the modality LUT (HU for CT).

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


def apply_window(values: np.ndarray, window: Window) -> np.ndarray:
    """Values -> 0 (black) to 1 (white), PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    x = np.nan_to_num(values.astype(np.float64), nan=-np.inf)
    if window.function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - window.center) / window.width, -60, 60)))
    if window.function == "LINEAR_EXACT":
        return np.clip((x - window.center) / window.width + 0.5, 0, 1)
    if window.width <= 1:
        return (x > window.center - 0.5).astype(np.float64)
    return np.clip((x - (window.center - 0.5)) / (window.width - 1) + 0.5, 0, 1)
