"""The published test sets from the Hugging Face hub, for machines that reach it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from babydoctor.eval.tasks import Question, Task, TaskConfig, closed_or_open
from babydoctor.hub import data_set_error
from babydoctor.schema import UserError


@dataclass(frozen=True, slots=True)
class HubSet:
    """Where a set lies and what its columns are called."""

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
    """Fetch a set with the ``datasets`` package. Raises UserError where the hub or the package is out of reach."""
    if config.task not in HUB_SETS:
        raise UserError(f"--task {config.task} --data hub: only {', '.join(HUB_SETS)} are on the hub; give a folder")
    hub_set = HUB_SETS[config.task]
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise UserError("--data hub needs the package datasets: `pip install babydoctor[train]`") from error
    try:
        rows = load_dataset(hub_set.repository, split=config.split or hub_set.split)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        hint = (
            f"Or fetch it where there is a network (`hf download {hub_set.repository} --repo-type dataset`), "
            "or give a local folder with --data"
        )
        raise data_set_error(error, hub_set.repository, hint=hint) from error
    rows = rows.cast_column("image", Image(decode=False))
    questions = tuple(_question(number, row, hub_set) for number, row in enumerate(rows))
    return Task(config.task, questions, (hub_set.note,) if hub_set.note else ())


def _question(number: int, row: dict[str, Any], hub_set: HubSet) -> Question:
    data = row["image"]["bytes"]
    references = (str(row[hub_set.answer]).strip(),)
    # The copies carry no image names: equal bytes are the same image.
    key = hashlib.sha256(data).hexdigest()[:16]
    prompt = str(row[hub_set.question]).strip()
    groups = {"question_type": str(row["content_type"])} if row.get("content_type") else {}
    return Question(str(number), data, key, prompt, references, closed_or_open(references), groups)
