"""Rows of chest radiographs and their reports. Shared by MIMIC-CXR and the Indiana University set."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, Literal

from babydoctor.schema import IMAGE_TOKEN

Section = Literal["both", "findings", "impression"]
SECTIONS: tuple[Section, ...] = ("both", "findings", "impression")

QUESTIONS: dict[Section, str] = {
    "both": "Write the findings and the impression of the radiology report of this chest radiograph.",
    "findings": "Write the findings section of the radiology report of this chest radiograph.",
    "impression": "Write the impression section of the radiology report of this chest radiograph.",
}

_KINDS = {"FINDINGS": "findings", "FINDING": "findings", "IMPRESSION": "impression", "CONCLUSION": "impression"}
_HEADERS = (
    *("FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION", "FINDINGS", "FINDING", "IMPRESSIONS?", "CONCLUSIONS?"),
    *("EXAMINATION", "EXAM", "TYPE OF EXAMINATION", "STUDY", "PROCEDURE", "VIEWS?", "TECHNIQUE"),
    *("INDICATIONS?", "HISTORY", "CLINICAL HISTORY", "CLINICAL INFORMATION", "CLINICAL INDICATION"),
    *("REASON FOR EXAM", "REASON FOR EXAMINATION", "REASON FOR THE EXAM", "REASON FOR STUDY"),
    *("COMPARISONS?", "COMPARISON EXAM", "REFERENCE EXAM", "RECOMMENDATIONS?", r"RECOMMENDATION\(S\)"),
    *("NOTIFICATIONS?", "COMMUNICATION", "WET READ", "ADDENDUM", "PRELIMINARY REPORT"),
)
_HEADER = re.compile(rf"^[ \t]*({'|'.join(_HEADERS)})[ \t]*:", re.M)


def parse_sections(report: str) -> dict[str, str]:
    """``findings`` and ``impression`` of a free-text report, each on one line. A missing section has no key.

    A section goes from its heading (in capitals, at the start of a line, with a colon) to the next known heading.
    Unknown headings, such as "CHEST, PA AND LATERAL:", belong to the section they are in, so no text is lost. Sections
    of one name are joined. "FINDINGS AND IMPRESSION" counts as findings.
    """
    parts: dict[str, list[str]] = {}
    headings = list(_HEADER.finditer(report))
    for heading, following in itertools.zip_longest(headings, headings[1:]):
        end = len(report) if following is None else following.start()
        name = heading[1].partition(" AND")[0].partition("/")[0]
        kind = _KINDS.get(name) or _KINDS.get(name.removesuffix("S"))
        text = " ".join(report[heading.end() : end].split())
        if kind is not None and text:
            parts.setdefault(kind, []).append(text)
    return {kind: " ".join(texts) for kind, texts in parts.items()}


def build_answer(sections: Mapping[str, str], section: Section) -> str:
    """The part of a report that becomes the answer of a row; empty if the report lacks it."""
    if section != "both":
        return sections.get(section, "")
    present = [(name, sections[name]) for name in ("findings", "impression") if sections.get(name)]
    return "\n".join(f"{name.capitalize()}: {text}" for name, text in present)


def build_row(id: str, image: str, answer: str, section: Section) -> dict[str, Any]:
    """An image and its report as a row."""
    question = f"{IMAGE_TOKEN}\n{QUESTIONS[section]}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}
