"""Questions about a phantom in many wordings.

``wordings.yaml`` holds the patterns. ``ask`` draws one, expands it, and varies it as people do: with a "please", lower
case, a missing question mark or a typo.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

PLAIN_SHARE = 0.45
"""Share of the questions that are not varied."""

TYPO_SHARE = 0.25
"""Share of the other questions that get a typo."""

_INNERMOST = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")
_SUBJECT = re.compile(r"\{(noun|clause|choice)\}")
_WORD = re.compile(r"[A-Za-z]{4,}")
_BEFORE = ("Please", "Please", "Please", "Hello,", "Hi,", "Doctor,", "OK,", "And", "So", "Now", "Well,", "Tell me:")
_CONTEXT = ("This is my patient.", "I am a student.", "Look at this image.", "Here is a scan.", "I am not sure.")
_AFTER = (
    "Please.",
    "Thanks.",
    "Thank you.",
    ", please",
    ", please",
    ", please.",
    "Please answer briefly.",
    "I need to know.",
)
_NOUNS = ("finding", "finding", "lesion", "abnormality", "problem", "pathology")
_NAMES = {
    "nodule": ("nodule", "lump", "mass"),
    "cyst": ("cyst", "bubble"),
    "effusion": ("effusion", "fluid"),
    "fracture": ("fracture", "broken rib", "break"),
}
_ONSETS = (*"bcdfghjklmnprstvwyz", "bl", "br", "ch", "cr", "dr", "fl", "gr", "pl", "pr", "sh", "sp", "st", "th", "tr")
_RHYMES = (
    *"aeiou",
    "ab",
    "ack",
    "ail",
    "an",
    "ar",
    "ast",
    "ay",
    "ed",
    "el",
    "en",
    "ent",
    "er",
    "est",
    "ick",
    "ing",
    "ion",
    "oo",
)
"""Beginnings and ends of the syllables of ``{nonsense}``: a question about an unknown thing is an outside question."""


@dataclass(frozen=True)
class Wordings:
    """Patterns by kind of request, and what the slots in them stand for.

    ``trained`` holds the kind's own patterns and every frame, filled with the kind's subjects.
    """

    slots: dict[str, str]
    trained: dict[str, tuple[str, ...]]
    held_out: dict[str, tuple[str, ...]]


@lru_cache(maxsize=1)
def load_wordings() -> Wordings:
    """Read ``wordings.yaml``."""
    data = yaml.safe_load(Path(__file__).with_name("wordings.yaml").read_text(encoding="utf-8"))
    splits = {
        split: {kind: tuple(lines.splitlines()) for kind, lines in data[split].items()}
        for split in ("trained", "held_out")
    }
    for kind, subjects in data["subjects"].items():
        splits["trained"][kind] += tuple(_fill_frames(data["frames"].splitlines(), subjects))
    return Wordings(data["slots"], **splits)


def _fill_frames(frames: Iterable[str], subjects: Mapping[str, str]) -> Iterator[str]:
    """Put a kind's subjects into the frames. Frames for which it has no subject are left out."""
    for frame in frames:
        match = _SUBJECT.search(frame)
        assert match is not None, frame
        if match[1] in subjects:
            yield frame.replace(match[0], f"({subjects[match[1]]})")


def expand(pattern: str, finding: str, rng: np.random.Generator) -> str:
    """Draw one sentence from a pattern.

    Args:
        finding: finding of the case, so that a question names no other one; "none" names none.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name == "nonsense":
            syllables = int(rng.integers(1, 4))
            return "".join(_pick(_ONSETS, rng) + _pick(_RHYMES, rng) for _ in range(syllables))
        if name in ("it", "it_noun"):
            names = _NAMES.get(finding, ())
            noun = _pick(names if names and rng.random() < 0.35 else _NOUNS, rng)
            return noun if name == "it_noun" else "it" if rng.random() < 0.25 else f"the {noun}"
        return load_wordings().slots[name]

    while _SLOT.search(pattern) or _INNERMOST.search(pattern):
        # Choose alternatives before filling slots, because a slot may be in an alternative that is not chosen.
        pattern, changed = _INNERMOST.subn(lambda match: _pick(match[1].split("|"), rng), pattern)
        if not changed:
            pattern = _SLOT.sub(fill, pattern, count=1)
    sentence = re.sub(r" +", " ", pattern).strip()
    return sentence[0].upper() + sentence[1:]


def misspell(sentence: str, rng: np.random.Generator) -> str:
    """Make one typo in a word of four letters or more: letters swapped, dropped, doubled or replaced."""
    words = list(_WORD.finditer(sentence))
    if not words:
        return sentence
    word = words[int(rng.integers(len(words)))]
    place = int(rng.integers(word.start() + 1, word.end() - 1))
    one, two = sentence[place], sentence[place + 1]
    other = "aeiourstnl"[int(rng.integers(10))]
    changed = (two + one, two, one + one + two, other + two)[int(rng.integers(4))]
    return sentence[:place] + changed + sentence[place + 2 :]


def restyle(sentence: str, rng: np.random.Generator) -> str:
    """Change a question as people do when they type it."""
    if rng.random() < PLAIN_SHARE:
        return sentence
    if rng.random() < 0.3:
        first = sentence.split(" ")[0]
        # Names and abbreviations keep their capital letter.
        rest = sentence if first == "I" or not first[1:].islower() else sentence[0].lower() + sentence[1:]
        sentence = f"{_pick(_BEFORE, rng)} {rest}"
    elif rng.random() < 0.3:
        after = rng.random() < 0.6
        sentence = _append(sentence, _pick(_AFTER, rng)) if after else f"{_pick(_CONTEXT, rng)} {sentence}"
    if rng.random() < TYPO_SHARE:
        sentence = misspell(sentence, rng)
    if rng.random() < 0.3:
        sentence = sentence.lower()
    elif rng.random() < 0.03:
        sentence = sentence.upper()
    if rng.random() < 0.25:
        sentence = sentence.rstrip(".?!:") or sentence
    return sentence


def _append(sentence: str, after: str) -> str:
    return sentence.rstrip(".?!:") + after if after.startswith(",") else f"{sentence} {after}"


def ask(kind: str, finding: str, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """Draw a question.

    Args:
        kind: "modality", "finding", "side", "level", "location", "report" or "outside".
        finding: finding of the case.
        held_out: draw from the wordings that no training text contains.
    """
    wordings = load_wordings()
    patterns = (wordings.held_out if held_out else wordings.trained)[kind]
    return restyle(expand(_pick(patterns, rng), finding, rng), rng)


def _pick(values: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]
