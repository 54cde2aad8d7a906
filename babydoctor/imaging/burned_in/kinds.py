"""Classify a text in an image as a name, a date, a number, or a mark that identifies nobody. Pure.

The rules fail closed: only text that is known to be harmless is a mark. Any other word of two letters counts as a name.
"""

from __future__ import annotations

import re
from typing import Literal

TextKind = Literal["name", "date", "number", "unclear", "mark"]

IDENTIFYING: tuple[TextKind, ...] = ("name", "date", "number", "unclear")
"""Kinds that are hidden unless the user decides otherwise. ``unclear``: there is text that cannot be read."""

MIN_SCORE = 0.5
"""Below this recognition score a text of ``MIN_UNCLEAR`` characters is ``unclear``, and a shorter one is noise."""

MIN_UNCLEAR = 4

_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mai|okt|dez|mrz|ene|abr|ago|dic|fev|avr|juin|juil|aou"
_DATE = re.compile(
    rf"""(?=(?:\D?\d){{4}})\d{{1,4}}\s?[./:-]\s?\d{{1,2}}\s?[./:-]\s?\d{{1,4}}  # 12/03/1957, 1957-03-12, 14:32:07
    | (?<!\d)\d{{1,2}}:\d{{2}}(?!\d)                            # 14:32
    | (?<!\d)(?:19|20)\d{{2}}(?:0[1-9]|1[0-2])[0-3]\d(?!\d)     # 19570312
    | \d{{1,2}}[\s.-]*(?:{_MONTHS})[a-z]*[\s.,-]*\d{{2,4}}      # 03 Mar 1957
    | (?:{_MONTHS})[a-z]*[\s.-]*\d{{1,2}},?\s*\d{{4}}           # March 3, 1957
    """,
    re.IGNORECASE | re.VERBOSE,
)
_AGE = re.compile(r"(?:[FMO][\s/,]*)?(?:\d{3}[YMWD]|\d{1,3}\s?(?:Y|YO|YRS?|years?))(?:[\s/,]*[FMO])?", re.IGNORECASE)
_UNITS = (
    "mm|cm|m|um|s|ms|sec|min|hz|khz|mhz|ghz|db|%|kv|kvp|ma|mas|mgy|gy|ugy|deg|°|bpm|fps|hu|t|x|px|cm/s|m/s|mm/s|"
    "ml|l|g|kg|mg|mmhg|°c|v|w|mw|mw/cm2|in"
)
_MEASURE = re.compile(
    rf"(?<![^\W_])[+-]?\d{{1,4}}(?:[.,]\d{{1,3}})?\s?(?:{_UNITS})(?:\^?[23])?(?![^\W_])", re.IGNORECASE
)

_LATERALITY = (
    "r l rt lt left right a p h f s i rl lr ap pa lat rpo lpo rao lao ra la rp lp hf fh ar al pr pl rcc lcc rmlo lmlo "
    "cc mlo"
)
_LABELS = (
    "mi ti tis tib tic wl ww wc ws w l c z g gn gain fr fps zoom mag im img se seq sl slice loc pos thk tr te tf tt ta "
    "fov kv kvp ma mas ao dr pr prf pw cw cf cfm pwr pdi bw thi gen hgen crd res 2d 3d 4d b m hz persist map tgc focus "
    "cine frame frames acc rot tilt fa nex etl vel dist area vol depth freq db filter wf sv angle hr et dap ei s pen"
)
_WORDS = (
    "portable erect supine upright prone decubitus expiration inspiration standing sitting semi axial coronal sagittal "
    "oblique transverse trans long lateral anterior posterior superior inferior medial proximal distal head feet foot "
    "chest abdomen abd pelvis spine knee hip hand wrist elbow shoulder ankle neck brain liver kidney kid spleen gb cbd "
    "aorta ivc bladder uterus ovary thyroid breast heart lymph node t1 t2 flair dwi adc stir mip mpr pre post contrast "
    "arterial venous delayed scout topogram localizer dicom mean max min sd area length width level window lossy "
    "lossless compressed plus minus red green blue"
)
_KNOWN = frozenset(f"{_LATERALITY} {_LABELS} {_WORDS}".split())
_ANY_LABEL = "|".join(sorted(_LABELS.split(), key=len, reverse=True))
_LABELLED = re.compile(
    rf"(?<![^\W_])(?:{_ANY_LABEL})\s?[:=<>#.]?\s?[+-]?\d{{1,4}}(?:[.,]\d+)?(?![^\W_])", re.IGNORECASE
)
_PATIENT = re.compile(
    r"\b(?:id|mrn|pid|dob|acc|accession|patient|pat|name|nhs|ssn|born|birth|geb|hosp\w*|clinic|dr|mr|mrs)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CODE = re.compile(r"(?=\w*\d)\w{5,}")


def kind_of(text: str, score: float) -> TextKind | None:
    """Classify a recognized text; None for noise.

    Args:
        text: the recognized text, wrong letters included.
        score: confidence of the recognition, 0 to 1.
    """
    text = text.strip()
    if score < MIN_SCORE:
        return "unclear" if len(text) >= MIN_UNCLEAR else None
    if _DATE.search(text) or _AGE.fullmatch(text):
        return "date"
    rest = _LABELLED.sub(" ", _MEASURE.sub(" ", text)) if not _PATIENT.search(text) else text
    if sum(map(str.isdigit, rest)) >= 4 or any(sum(map(str.isdigit, code)) >= 2 for code in _CODE.findall(rest)):
        return "number"
    words = [word for word in _WORD.findall(rest) if word.lower() not in _KNOWN]
    if any(len(_IDEOGRAPHS.findall(word)) >= 2 or not _IDEOGRAPHS.search(word) for word in words):
        return "name"
    return "mark"
