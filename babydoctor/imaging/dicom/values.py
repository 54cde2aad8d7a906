"""Read numbers and text of a DICOM data set. A damaged or empty element does not affect others.

If an attribute occurs more than once, the functional group of the frame has priority over the shared group, and that
over the top level (PS3.3 C.7.6.16). An element without a usable value counts as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from babydoctor.imaging.windows import Window, WindowFunction, window_label

_CODE_STRING = re.compile(r"[A-Za-z0-9 _\-]{1,16}")  # PS3.5 6.2, and lower case, which some files have

MAX_SPACING_RATIO = 40
"""Largest ratio of vertical and horizontal pixel spacing. A larger ratio is considered an error in the header."""

_SIDES = re.compile("[RLAPHF]{1,3}")


def numbers(item: Any, keyword: str) -> list[float]:
    """The numbers of an element in order, NaN for anything else; empty if it is absent or empty."""
    if item is None or keyword not in item:
        return []
    try:
        value = item[keyword].value
    except Exception:  # pydicom converts values on access and raises many kinds of errors
        value = _raw_text(item, keyword)
    if value is None or (isinstance(value, (str, bytes)) and not value.strip()):
        return []
    parts = [value] if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__") else list(value)
    return [_number(part) for part in parts]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _raw_text(item: Any, keyword: str) -> Any:
    """The parts of an element that pydicom could not convert."""
    raw = getattr(item.get_item(keyword), "value", None)
    return raw.decode("latin-1").rstrip("\0 ").split("\\") if isinstance(raw, bytes) else None


def number(item: Any, keyword: str) -> float | None:
    """The first number of an element if it is finite, else None."""
    found = numbers(item, keyword)
    return found[0] if found and math.isfinite(found[0]) else None


def integer(item: Any, keyword: str) -> int | None:
    """The first number of an element if it is whole, else None."""
    value = number(item, keyword)
    return int(value) if value is not None and value == int(value) else None


def text(item: Any, keyword: str) -> str:
    """The text of an element without surrounding blanks, or the first of several texts; empty if there is none."""
    try:
        value = item.get(keyword)
    except Exception:
        return ""
    if value is None:
        return ""
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        value = next(iter(value), "")
    return str(value).strip("\0 ")


def code(item: Any, keyword: str) -> str:
    """The text of an element if it is a code string, else empty, because free text may name a person."""
    value = text(item, keyword)
    return value if _CODE_STRING.fullmatch(value) else ""


def items(item: Any, keyword: str) -> list[Any]:
    """The items of a sequence; empty if it is absent or damaged."""
    try:
        value = item.get(keyword)
    except Exception:
        return []
    return [entry for entry in value if hasattr(entry, "get_item")] if hasattr(value, "__iter__") else []


def places(dataset: Any, frame: int, group: str) -> Iterator[Any]:
    """Yield the items that may hold a frame's attributes, by priority: per frame, shared, top level."""
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    shared = items(dataset, "SharedFunctionalGroupsSequence")
    for functional in (*per_frame[frame : frame + 1], *shared[:1]):
        yield from items(functional, group)[:1]
    yield dataset


def rescale(dataset: Any, frame: int, warnings: list[str]) -> tuple[float, float]:
    """(slope, intercept) of a frame. Values that are not finite and a slope of 0 are ignored with a warning."""
    for item in places(dataset, frame, "PixelValueTransformationSequence"):
        slopes, intercepts = numbers(item, "RescaleSlope"), numbers(item, "RescaleIntercept")
        slope = slopes[0] if slopes else None
        intercept = intercepts[0] if intercepts else None
        if slope is not None and (not math.isfinite(slope) or slope == 0):
            warnings.append(f"RescaleSlope {slope:g} is ignored")
            slope = None
        if intercept is not None and not math.isfinite(intercept):
            warnings.append(f"RescaleIntercept {intercept:g} is ignored")
            intercept = None
        if slope is not None or intercept is not None:
            return (1.0 if slope is None else slope), (0.0 if intercept is None else intercept)
    return 1.0, 0.0


def windows(dataset: Any, frame: int, warnings: list[str] | None = None) -> tuple[Window, ...]:
    """A frame's own windows. A window that is not finite or not wider than 0 is left out with a warning."""
    for item in places(dataset, frame, "FrameVOILUTSequence"):
        found = _windows_of(item, warnings if warnings is not None else [])
        if found:
            return found
    return ()


def _windows_of(item: Any, warnings: list[str]) -> tuple[Window, ...]:
    centers, widths = numbers(item, "WindowCenter"), numbers(item, "WindowWidth")
    labels: Any = item.get("WindowCenterWidthExplanation") or []
    labels = [labels] if isinstance(labels, str) else [str(label) for label in labels]
    stated = text(item, "VOILUTFunction").upper() or "LINEAR"
    function: WindowFunction = "LINEAR"
    if stated in ("LINEAR_EXACT", "SIGMOID"):
        function = stated  # type: ignore[assignment]
    elif stated != "LINEAR" and centers:
        warnings.append("the VOI LUT function is unknown; read as LINEAR")
    found = []
    for index, (center, width) in enumerate(zip(centers, widths, strict=False)):
        label = window_label(labels[index]) if index < len(labels) else ""
        label = label or f"window {index + 1} of {len(centers)} in the file"
        if math.isfinite(center) and math.isfinite(width) and width > 0:
            found.append(Window(center, width, label, function))
        else:
            warnings.append(f"the file's window with center {center:g} and width {width:g} is ignored")
    return tuple(found)


def pixel_spacing(dataset: Any, frame: int) -> tuple[float, float] | None:
    """(row, column) spacing in mm: at the patient if the file has it, else at the detector."""
    for item in places(dataset, frame, "PixelMeasuresSequence"):
        if pair := _positive_pair(numbers(item, "PixelSpacing")):
            return pair
    for keyword in ("ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        if pair := _positive_pair(numbers(dataset, keyword)):
            return pair
    return None


def orientation(dataset: Any, frame: int) -> tuple[str, str, str, str] | None:
    """The patient's side at the (left, top, right, bottom) edge; None if the file does not say.

    Letters: R, L, A(nterior), P(osterior), H(ead), F(oot); two for an oblique plane. PS3.3 C.7.6.2.1.1 and C.7.6.1.1.1.
    """
    for item in places(dataset, frame, "PlaneOrientationSequence"):
        cosines = numbers(item, "ImageOrientationPatient")
        if len(cosines) == 6 and all(math.isfinite(value) for value in cosines):
            right, bottom = _letters(cosines[:3]), _letters(cosines[3:])
            return (_opposite(right), _opposite(bottom), right, bottom) if right and bottom else None
    value: Any = dataset.get("PatientOrientation") or []
    stated = [str(part).upper() for part in value] if hasattr(value, "__iter__") else []
    if len(stated) == 2 and all(_SIDES.fullmatch(part) for part in stated):
        right, bottom = stated
        return _opposite(right), _opposite(bottom), right, bottom
    return None


def _letters(direction: list[float]) -> str:
    """The sides to which a direction points, the main one first. Within 15 degrees of an axis, only that one."""
    sizes = [abs(value) for value in direction]
    length = math.hypot(*sizes)
    order = sorted(range(3), key=lambda axis: -sizes[axis])
    sides = [("R", "L"), ("A", "P"), ("F", "H")]
    return "".join(sides[axis][direction[axis] > 0] for axis in order[:2] if sizes[axis] > 0.26 * length)


def _opposite(letters: str) -> str:
    return letters.translate(str.maketrans("RLAPHF", "LRPAFH"))


def pixel_shape(dataset: Any, frame: int, warnings: list[str]) -> tuple[float, float]:
    """(height, width) of a pixel on any scale; square if the file states none or an impossible one."""
    shape = pixel_spacing(dataset, frame) or _positive_pair(numbers(dataset, "PixelAspectRatio")) or (1.0, 1.0)
    if max(shape) / min(shape) > MAX_SPACING_RATIO:
        warnings.append(f"the pixel spacing {shape[0]:g} x {shape[1]:g} is not plausible; pixels are shown square")
        return 1.0, 1.0
    return shape


def _positive_pair(values: list[float]) -> tuple[float, float] | None:
    if len(values) == 2 and all(math.isfinite(value) and value > 0 for value in values):
        return values[0], values[1]
    return None


def padding_range(dataset: Any, layout_bits: int, is_signed: bool | None) -> tuple[float, float] | None:
    """(lowest, highest) padding value as stored, PS3.3 C.7.5.1.1.2. ``is_signed`` is None for float pixels.

    The value often has the wrong one of the types US and SS, so it is read with the type of the pixels.
    """
    found = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        kinds = (keyword,) if is_signed is not None else (f"Float{keyword}", f"DoubleFloat{keyword}", keyword)
        value = next((v for v in (number(dataset, kind) for kind in kinds) if v is not None), None)
        if value is None:
            break
        if is_signed is not None:
            value %= 2**layout_bits
            value -= 2**layout_bits if is_signed and value >= 2 ** (layout_bits - 1) else 0
        found.append(value)
    return (min(found), max(found)) if found else None
