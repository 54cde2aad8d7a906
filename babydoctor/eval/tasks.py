"""A task: questions with references. Also the readers of LLaVA rows and phantoms.

``formats.py`` reads the published test sets, and ``load.py`` chooses the reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from babydoctor.config import TaskConfig
from babydoctor.data.dataset_rows import EMBEDDED
from babydoctor.data.problems import REASONS, RowError
from babydoctor.data.row_formats import RowContent, read_row
from babydoctor.data.sources import iter_rows, read_embedded
from babydoctor.eval.metrics import NO, YES, normalize
from babydoctor.files import split_lines
from babydoctor.phantom import text as phantom_text
from babydoctor.schema import IMAGE_TOKEN, UserError

Kind = Literal["closed", "open", "caption"]
_GROUP_KEYS = {
    "question_type": "question_type",
    "image_organ": "organ",
    "organ": "organ",
    "image_modality": "modality",
    "modality": "modality",
}
# Misspelled types in VQA-RAD's official file.
_MISSPELLED = {"ATRIB": "ATTRIB", "PRSE": "PRES"}
CAPTION_PROMPT = "The following image is a radiology scan. Deeply analyze and diagnose this image."


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its reference answers.

    Attributes:
        image: a file, encoded bytes, or None.
        image_key: name of the image, or of the row without one; questions with the same key are about the same image.
        prompt: the question, without an image token.
        references: correct answers. The first one is shown in reports.
        groups: attributes to break figures down by, for example ``{"question_type": "PRES"}``.
        subsets: subsets that are also scored on their own, for example "article_disjoint".
        cluster: unit that the bootstrap resamples, such as an article; empty: the image, or the row without one.
        shuffled_among: shuffled images come from questions with the same value; empty: from all questions.
    """

    id: str
    image: Path | bytes | None = field(repr=False)
    image_key: str
    prompt: str
    references: tuple[str, ...]
    kind: Kind
    groups: Mapping[str, str] = field(default_factory=dict)
    subsets: tuple[str, ...] = ()
    cluster: str = ""
    shuffled_among: str = ""

    @property
    def yes_no_reference(self) -> str:
        """ "yes" or "no" if that is the only reference of a closed question, else ""."""
        normalized = {normalize(reference) for reference in self.references}
        if self.kind != "closed" or len(normalized) != 1:
            return ""
        (answer,) = normalized
        return answer if answer in (YES, NO) else ""


@dataclass(frozen=True, slots=True)
class Task:
    """The questions of one task, in a fixed order. ``notes`` appear in the report unchanged."""

    name: str
    questions: tuple[Question, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def is_caption(self) -> bool:
        return all(question.kind == "caption" for question in self.questions)

    @property
    def num_images(self) -> int:
        """Distinct images. Questions may have none."""
        return len({question.image_key for question in self.questions if question.image is not None})

    @property
    def resampled(self) -> str:
        """What the bootstrap resamples, as a plural noun."""
        if any(question.cluster for question in self.questions):
            return "articles"
        if all(question.image is not None for question in self.questions):
            return "images"
        return "images and rows" if self.num_images else "rows"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, prompts, references and image names. Equal fingerprints mean the same test."""
        digest = hashlib.sha256()
        for question in self.questions:
            row = [question.id, question.image_key, question.prompt, list(question.references), question.kind]
            digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file does not exist or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check --data") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def closed_or_open(references: tuple[str, ...]) -> Kind:
    """Closed if every reference is "yes" or "no". For formats that do not mark closed questions."""
    return "closed" if {normalize(reference) for reference in references} <= {YES, NO} else "open"


def normalize_group(value: str) -> str:
    """Normalize the name of a group for plots. Of several types ("PRES, ATTRIB") the first is used."""
    first = value.split(",")[0].strip().upper()
    return _MISSPELLED.get(first, first) or "UNKNOWN"


def load_llava_rows(config: TaskConfig) -> Task:
    """Read LLaVA JSON: each user turn is asked separately, and the next turn is its reference.

    Later turns are asked without the turns before them. Rows may have ``answer_type`` (closed, open, caption) and, for
    plots, ``question_type``, ``image_organ`` and ``modality``.
    """
    path = Path(config.data)
    images = Path(config.images) if config.images else path.parent / "images"
    questions: list[Question] = []
    for number, (where, row) in enumerate(iter_rows(path)):
        content, pairs = _read_llava_row(row, where)
        name, row_id = content.image, str(row.get("id", number))
        image = _locate_image(name, images)
        groups = {group: normalize_group(str(row[key])) for key, group in _GROUP_KEYS.items() if row.get(key)}
        for turn, (prompt, answer) in enumerate(pairs):
            references = (answer,)
            kind = _row_kind(row.get("answer_type"), references)
            identity = row_id + (f"-{turn}" if len(pairs) > 1 else "")
            key = name if isinstance(name, str) else row_id
            questions.append(Question(identity, image, key, prompt, references, kind, groups))
    return Task("rows", tuple(questions))


def _read_llava_row(row: Any, where: str) -> tuple[RowContent, list[tuple[str, str]]]:
    """A row with its (question, answer) pairs.

    Raises:
        UserError: the row is malformed; the message names the row and the problem.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a LLaVA row (needs conversations of from and value)")
    try:
        content = read_row(row)
    except RowError as error:
        raise UserError(f"{where}: {REASONS[error.problem.reason]} ({error.problem.detail})") from error
    turns = content.turns
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(f"{where}: {REASONS['turn_order']} ({', '.join(turn.role for turn in turns[:8])})")
    if content.system is not None:
        raise UserError(f"{where}: has its own system prompt, which the evaluation does not use; remove it")
    texts = [turn.text.strip() for turn in turns]
    return content, [
        (question.replace(IMAGE_TOKEN, "").strip(), answer)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


def _locate_image(name: str | bytes | None, folder: Path) -> Path | bytes | None:
    if not isinstance(name, str):
        return name
    return read_embedded(name) if name.startswith(EMBEDDED) else folder / name


def _row_kind(answer_type: object, references: tuple[str, ...]) -> Kind:
    kind = str(answer_type or "").strip().lower()
    if kind in ("closed", "open", "caption"):
        return kind  # type: ignore[return-value]
    return closed_or_open(references)


def load_phantom(config: TaskConfig) -> Task:
    """The closed questions about held-out phantoms (``questions.jsonl`` of ``babydoctor data phantom``).

    The first reference is the answer in radiology terms, which stage 3 teaches. The others are the answers in lay words
    of the earlier stages. A question about side or level is never shuffled to a normal image, where the right answer is
    that there is no abnormality: chance would then not be that of the question.
    """
    folder = Path(config.data)
    path = folder / "questions.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; make the phantoms with `babydoctor data phantom --out {folder}`")
    images = Path(config.images) if config.images else folder / "images"
    questions = []
    for line in split_lines(path.read_text(encoding="utf-8")):
        row = json.loads(line)
        kind, truth = row["kind"], row["truth"]
        prompt = row["question"].replace(IMAGE_TOKEN, "").strip()
        questions.append(
            Question(
                row["id"],
                images / row["image"],
                row["image"],
                prompt,
                (row["answer"], phantom_text.lay_answer(kind, truth)),
                "closed",
                {"question_type": kind},
                shuffled_among="finding" if kind in ("side", "level") else "",
            )
        )
    return Task("phantom", tuple(questions), ("Generated phantoms: these figures say nothing about real patients.",))
