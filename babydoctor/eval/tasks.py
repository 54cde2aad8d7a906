"""Tasks: questions with references, whatever format they come in.

``load_task`` is the one way in. The formats of the published sets stand in ``formats.py``; here are the records,
LLaVA rows and the phantoms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from babydoctor.data.problems import REASONS, RowError
from babydoctor.data.row_formats import RowContent, read_row
from babydoctor.data.sources import EMBEDDED, iter_rows, read_embedded
from babydoctor.eval.metrics import NO, YES, normalize
from babydoctor.schema import IMAGE_TOKEN, UserError

Kind = Literal["closed", "open", "caption"]
_GROUP_KEYS = {
    "question_type": "question_type",
    "image_organ": "organ",
    "organ": "organ",
    "image_modality": "modality",
    "modality": "modality",
}
# Misspelt types in VQA-RAD's official file.
_MISSPELT = {"ATRIB": "ATTRIB", "PRSE": "PRES"}
CAPTION_PROMPT = "The following image is a radiology scan. Deeply analyze and diagnose this image."


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its references.

    ``image`` is a file, the encoded bytes, or None; ``image_key`` names it. ``prompt`` holds no image token.
    ``references`` are alternatives; the first is the one to show. ``groups`` are what plots go by
    ({"question_type": "PRES"}); ``subsets`` are scored apart ("article_disjoint"). ``cluster`` names what intervals
    are drawn by; empty means the image.
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

    @property
    def yes_no_reference(self) -> str:
        """ "yes" or "no" where that is the only answer to a closed question, else ""."""
        normalized = {normalize(reference) for reference in self.references}
        if self.kind != "closed" or len(normalized) != 1:
            return ""
        (answer,) = normalized
        return answer if answer in (YES, NO) else ""


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one kind of task, in a fixed order. ``notes`` go into the report as they are."""

    name: str
    questions: tuple[Question, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def is_caption(self) -> bool:
        return all(question.kind == "caption" for question in self.questions)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, prompts, references and image names: equal fingerprints are the same test."""
        digest = hashlib.sha256()
        for question in self.questions:
            row = [question.id, question.image_key, question.prompt, list(question.references), question.kind]
            digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """What to ask. ``task`` is a name of ``TASKS``; ``data`` a folder, a file, or "hub" for the published copy.

    - ``images``: folder of the images; default is beside the data.
    - ``split``: part of the data; each format has its own default.
    - ``language``: SLAKE only.
    - ``prompt``: how a question is asked; ``{question}`` is replaced.
    - ``max_questions``: the first so many questions, 0 for all.
    - ``train``: LLaVA JSON files (or a ROCO folder) that the model was trained on, for leakage and baselines.
    """

    task: str
    data: str
    images: str | None = None
    split: str | None = None
    language: str = "en"
    prompt: str = "{question}"
    max_questions: int = 0
    train: tuple[str, ...] = ()


def load_task(config: TaskConfig) -> Task:
    """Read the questions of a task. Raises UserError that names what is missing and where it comes from."""
    from babydoctor.eval import formats, hub

    loaders: dict[str, Callable[[TaskConfig], Task]] = {
        "vqa-rad": formats.load_vqa_rad,
        "slake": formats.load_slake,
        "path-vqa": formats.load_path_vqa,
        "vqa-med": formats.load_vqa_med,
        "roco": formats.load_roco,
        "phantom": load_phantom,
        "rows": load_llava_rows,
    }
    if config.task not in loaders:
        raise UserError(f"--task {config.task}: no such task; there are {', '.join(loaders)}")
    if "{question}" not in config.prompt:
        raise UserError(f"--prompt {config.prompt!r}: must hold {{question}} where the question goes")
    task = hub.load_from_hub(config) if config.data == "hub" else loaders[config.task](config)
    questions = task.questions[: config.max_questions or None]
    if not questions:
        raise UserError(f"--task {config.task} --data {config.data}: no question is left in split {config.split!r}")
    _check(questions, config)
    questions = tuple(
        replace(question, prompt=config.prompt.replace("{question}", question.prompt)) for question in questions
    )
    return replace(task, questions=questions)


def _check(questions: tuple[Question, ...], config: TaskConfig) -> None:
    missing = sorted({str(q.image) for q in questions if isinstance(q.image, Path) and not q.image.is_file()})
    if missing:
        raise UserError(
            f"--task {config.task} --data {config.data}: {len(missing)} images are missing, first {missing[0]}; "
            "give their folder with --images"
        )
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"--data {config.data}: the question id {question.id!r} stands there twice")
        seen.add(question.id)


def read_json(path: Path) -> Any:
    """Read a JSON file; a UserError names the file and what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def closed_or_open(references: tuple[str, ...]) -> Kind:
    """A question is closed where every reference is "yes" or "no"; for formats that do not say it themselves."""
    return "closed" if {normalize(reference) for reference in references} <= {YES, NO} else "open"


def normalize_group(value: str) -> str:
    """One name for plots: of several question types ("PRES, ATTRIB") the first counts."""
    first = value.split(",")[0].strip().upper()
    return _MISSPELT.get(first, first) or "UNKNOWN"


def load_llava_rows(config: TaskConfig) -> Task:
    """Any LLaVA JSON: every question of the user whose answer stands in the row is asked by itself.

    A question of a later turn is asked without the turns before it. Rows may carry ``answer_type`` (closed, open,
    caption) and, for plots, ``question_type``, ``image_organ`` and ``modality``.
    """
    path = Path(config.data)
    images = Path(config.images) if config.images else path.parent / "images"
    questions: list[Question] = []
    for number, (where, row) in enumerate(iter_rows(path)):
        content, pairs = _read_llava_row(row, where)
        name = content.image
        image = _locate_image(name, images)
        groups = {group: normalize_group(str(row[key])) for key, group in _GROUP_KEYS.items() if row.get(key)}
        for turn, (prompt, answer) in enumerate(pairs):
            references = (answer,)
            kind = _row_kind(row.get("answer_type"), references)
            identity = str(row.get("id", number)) + (f"-{turn}" if len(pairs) > 1 else "")
            key = name if isinstance(name, str) else identity
            questions.append(Question(identity, image, key, prompt, references, kind, groups))
    return Task("rows", tuple(questions))


def _read_llava_row(row: Any, where: str) -> tuple[RowContent, list[tuple[str, str]]]:
    """A row with its questions and answers. Raises ``UserError`` naming the row and what is wrong with it."""
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
        raise UserError(f"{where}: has a system prompt of its own, which evaluation does not ask with; remove it")
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
    """The closed questions about held-out phantoms (``questions.jsonl`` of `babydoctor data phantom`).

    The truth is exact. It counts in radiology terms (the first reference, what stage 3 teaches) and in the lay
    words of the earlier stages.
    """
    from babydoctor.phantom import text as phantom_text

    folder = Path(config.data)
    path = folder / "questions.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make the phantoms with `babydoctor data phantom --out {folder}`")
    images = Path(config.images) if config.images else folder / "images"
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind, truth = row["kind"], row["truth"]
        lay_word = phantom_text.LAY[kind][truth]
        lay = tuple(answer.format(lay_word) for answer in phantom_text.LAY_ANSWERS[kind])
        prompt = row["question"].replace(IMAGE_TOKEN, "").strip()
        questions.append(
            Question(
                row["id"],
                images / row["image"],
                row["image"],
                prompt,
                (row["answer"], *lay),
                "closed",
                {"question_type": kind},
            )
        )
    return Task("phantom", tuple(questions), ("Generated phantoms: nothing here says anything about real patients.",))
