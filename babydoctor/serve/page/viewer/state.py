"""The state of the viewer, as exchanged between the server and the canvas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from babydoctor.imaging.dicom.values import number
from babydoctor.imaging.limits import MAX_ASPECT
from babydoctor.imaging.windows import CT_PRESETS
from babydoctor.serve.page.scan import Scan, View
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.arrangement import Arrangement, Region

SMALLEST_REGION = 8
"""Shortest edge of a region, in pixels of the file."""


def viewer_state(scan: Scan, view: View) -> dict[str, Any]:
    """The state of a scan for ``viewer.js``. ``view`` is the image that the model receives."""
    arrangement = scan.arrangement
    return {
        "key": scan.key,
        "change": scan.change,
        "rows": scan.facts["rows"],
        "columns": scan.facts["columns"],
        "frames": scan.num_frames,
        "frame": scan.frame,
        "noun": scan.noun,
        "frame_ms": _frame_ms(scan),
        "has_window": scan.has_window,
        "step": scan.window_range().step if scan.has_window else 1,
        "presets": [[name, CT_PRESETS[name].center, CT_PRESETS[name].width] for name in scan.presets[1:]],
        "default_preset": scan.default_preset,
        "preset": scan.preset,
        "center": scan.center,
        "width": scan.width,
        "is_inverted": arrangement.is_inverted,
        "is_mirrored": arrangement.is_mirrored,
        "quarter_turns": arrangement.quarter_turns,
        "region": arrangement.region,
        "hidden": _hidden_boxes(scan, view),
    }


def _hidden_boxes(scan: Scan, view: View) -> list[list[float]]:
    """Left, top, right and bottom of each text that is hidden from the model, in pixels of the file."""
    width, height = view.source_size
    x, y = scan.facts["columns"] / max(width, 1), scan.facts["rows"] / max(height, 1)
    return [[box.left * x, box.top * y, box.right * x, box.bottom * y] for box in view.hidden]


def take_state(scan: Scan, values: Mapping[str, Any]) -> None:
    """Apply the canvas's state to a scan. On an error, only the number of the change is applied.

    Raises:
        PageError: ``values`` is malformed, or requests something that the image does not have.
    """
    scan.change = _integer(values, "change", 2**53)
    frame = _integer(values, "frame", scan.num_frames - 1)
    arrangement = Arrangement(
        is_inverted=_flag(values, "is_inverted"),
        is_mirrored=_flag(values, "is_mirrored"),
        quarter_turns=_integer(values, "quarter_turns", 3),
        region=_region(values.get("region"), scan),
    )
    preset, center, width = values.get("preset"), values.get("center"), values.get("width")
    if preset is not None and preset not in scan.presets[1:]:
        raise PageError("bad_event")
    if (center is None) != (width is None) or (center is not None and not scan.has_window):
        raise PageError("bad_event")
    if center is not None:
        if not (_is_number(center) and _is_number(width)) or preset is not None:
            raise PageError("bad_event")
        scan.set_window(float(center), float(width or 0))
    else:
        scan.center = scan.width = None
        scan.preset = preset
    scan.frame, scan.arrangement = frame, arrangement


def _frame_ms(scan: Scan) -> float | None:
    """Time from one frame to the next, in milliseconds; None if the file does not state it."""
    if scan.dicom is None:
        return None
    dataset = scan.dicom.dataset
    rate = number(dataset, "CineRate") or number(dataset, "RecommendedDisplayFrameRate")
    time_ms = number(dataset, "FrameTime") or (1000 / rate if rate else None)
    return time_ms if time_ms and math.isfinite(time_ms) and time_ms > 0 else None


def _integer(values: Mapping[str, Any], name: str, largest: int) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest:
        raise PageError("bad_event")
    return value


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool):
        raise PageError("bad_event")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _region(value: Any, scan: Scan) -> Region | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4 or any(type(edge) is not int for edge in value):
        raise PageError("bad_event")
    left, top, right, bottom = value
    if not (0 <= left < right <= scan.facts["columns"] and 0 <= top < bottom <= scan.facts["rows"]):
        raise PageError("bad_event")
    edges = sorted((right - left, bottom - top))
    if edges[0] < SMALLEST_REGION or edges[1] > MAX_ASPECT * edges[0]:
        raise PageError("odd_region")
    return left, top, right, bottom
