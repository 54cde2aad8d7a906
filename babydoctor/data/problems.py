"""Why rows are bad: the known reasons, one record per bad row, and a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from babydoctor.schema import IMAGE_TOKEN, UserError

REASONS: dict[str, str] = {
    "not_json": "the line is not JSON",
    "not_a_row": "not an object with a list of conversations (or messages)",
    "bad_turn": "a turn is not {from: human|gpt, value: text} or {role: user|assistant, content: text}",
    "system_turn": "a system turn after the first turn, or a second system prompt",
    "unknown_key": "a key that would be dropped; remove it, or put it under 'metadata' if it only describes the row",
    "repeated_key": "a key that appears twice in one object; one of its values would be dropped",
    "several_images": "more than one image; a row has one",
    "turn_order": "turns do not go human, gpt, human, gpt ...",
    "empty_answer": "an answer without text",
    "empty_question": "a question with neither text nor image",
    "image_token_missing": f"an image, but no {IMAGE_TOKEN} in the first question",
    "image_token_without_image": f"{IMAGE_TOKEN} in the text, but no image",
    "image_token_repeated": f"more than one {IMAGE_TOKEN}",
    "image_token_misplaced": f"{IMAGE_TOKEN} in an answer or a later question",
    "duplicate": "the same id, image and conversation as an earlier row",
    "too_long": "more tokens than the limit",
    "template": "the conversation does not fit the template",
    "image_path": "an image reference that is absolute, leaves the image folder or is not text",
    "image_missing": "the image file does not exist",
    "image_undecodable": "the image cannot be decoded",
    "burned_in_text": "the image shows what looks like a name, a date or a number; hide it or leave the row out",
    "text_search_failed": "the search for text in the image failed, so the image was not checked",
}
"""Reason why a row is bad -> its explanation."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row is bad. ``source`` says where the row is, ``reason`` is a key of ``REASONS``."""

    source: str
    id: str
    reason: str
    detail: str


class RowError(UserError):
    """A row that cannot become a sample."""

    def __init__(self, reason: str, detail: str, *, source: str = "", id: str = "") -> None:
        assert reason in REASONS, reason
        self.problem = Problem(source, id, reason, detail)
        super().__init__(f"{source}: {REASONS[reason]}" + (f" ({detail})" if detail else ""))


def summarize(problems: Sequence[Problem], num_rows: int, num_shown: int = 5) -> str:
    """A few lines of text: the number of bad rows by reason, and the first few bad rows."""
    counts = Counter(problem.reason for problem in problems).most_common()
    lines = [f"{len(problems):,} of {num_rows:,} rows are bad:"]
    lines += [f"  {count:,} {reason}: {REASONS[reason]}" for reason, count in counts]
    lines += ["first:"]
    lines += [f"  {p.source} (id {p.id}) {p.reason}: {p.detail}" for p in problems[:num_shown]]
    return "\n".join(lines)


def write_problems(problems: Iterable[Problem], path: Path) -> None:
    """Write problems as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
