"""``load_task`` reads the questions of a task, from local files or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from babydoctor.config import TaskConfig
from babydoctor.eval import formats
from babydoctor.eval.tasks import Question, Task, closed_or_open, load_llava_rows, load_phantom
from babydoctor.hub import data_set_error
from babydoctor.schema import UserError

READERS: MappingProxyType[str, Callable[[TaskConfig], Task]] = MappingProxyType(
    {
        "vqa-rad": formats.load_vqa_rad,
        "slake": formats.load_slake,
        "path-vqa": formats.load_path_vqa,
        "vqa-med": formats.load_vqa_med,
        "roco": formats.load_roco,
        "phantom": load_phantom,
        "rows": load_llava_rows,
    }
)


def load_task(config: TaskConfig) -> Task:
    """Read the questions of a task.

    Raises:
        UserError: the task does not exist, data are missing or malformed, or no question is left.
    """
    if config.task not in READERS:
        raise UserError(f"--task {config.task}: no such task; there are {', '.join(READERS)}")
    if "{question}" not in config.prompt:
        raise UserError(f"--prompt {config.prompt!r}: must contain {{question}}, which is replaced by the question")
    task = load_from_hub(config) if config.data == "hub" else READERS[config.task](config)
    questions = task.questions[: config.max_questions or None]
    if not questions:
        raise UserError(f"--task {config.task} --data {config.data}: no question is left in split {config.split!r}")
    _check(questions, config)
    questions = tuple(
        replace(question, prompt=config.prompt.replace("{question}", question.prompt)) for question in questions
    )
    return replace(task, questions=questions)


def _check(questions: tuple[Question, ...], config: TaskConfig) -> None:
    for question in questions:
        named = PurePosixPath(question.image_key.replace("\\", "/"))
        if isinstance(question.image, Path) and (named.is_absolute() or ".." in named.parts):
            raise UserError(
                f"--task {config.task} --data {config.data}: question {question.id!r} names the image "
                f"{question.image_key!r}, which leaves the image folder; name images relative to --images"
            )
    missing = sorted({str(q.image) for q in questions if isinstance(q.image, Path) and not q.image.is_file()})
    if missing:
        raise UserError(
            f"--task {config.task} --data {config.data}: {len(missing)} images are missing, first {missing[0]}; "
            "give their folder with --images"
        )
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"--data {config.data}: the question id {question.id!r} occurs twice; make ids unique")
        seen.add(question.id)


@dataclass(frozen=True, slots=True)
class HubSet:
    """A published test set on the Hugging Face hub: repository, split and column names."""

    repository: str
    split: str = "test"
    question: str = "question"
    answer: str = "answer"
    note: str = ""


HUB_SETS = {
    "vqa-rad": HubSet(
        "flaviagiammarino/vqa-rad",
        note="The hub copy of VQA-RAD has no question types and no phrase types: closed means a yes/no reference.",
    ),
    "path-vqa": HubSet("flaviagiammarino/path-vqa"),
    "slake": HubSet("mdwiratathya/SLAKE-vqa-english"),
}


def load_from_hub(config: TaskConfig) -> Task:
    """Download a test set with the ``datasets`` package.

    Raises:
        UserError: the task is not on the hub, the package is missing, or the hub cannot be reached.
    """
    if config.task not in HUB_SETS:
        raise UserError(f"--task {config.task} --data hub: only {', '.join(HUB_SETS)} are on the hub; give a folder")
    hub_set = HUB_SETS[config.task]
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise UserError("--data hub needs the package datasets: `pip install babydoctor[train]`") from error
    try:
        rows = load_dataset(hub_set.repository, split=config.split or hub_set.split)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        hint = (
            f"Or fetch it on a machine with a network (`hf download {hub_set.repository} --repo-type dataset`), "
            "or give a local folder with --data"
        )
        raise data_set_error(error, hub_set.repository, hint=hint) from error
    rows = rows.cast_column("image", Image(decode=False))
    questions = tuple(_question(number, row, hub_set) for number, row in enumerate(rows))
    return Task(config.task, questions, (hub_set.note,) if hub_set.note else ())


def _question(number: int, row: dict[str, Any], hub_set: HubSet) -> Question:
    data = row["image"]["bytes"]
    references = (str(row[hub_set.answer]).strip(),)
    # The hub copies have no image names. Equal bytes mean the same image.
    key = hashlib.sha256(data).hexdigest()[:16]
    prompt = str(row[hub_set.question]).strip()
    groups = {"question_type": str(row["content_type"])} if row.get("content_type") else {}
    return Question(str(number), data, key, prompt, references, closed_or_open(references), groups)
