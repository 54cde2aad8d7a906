"""Readers of the published test sets, in their authors' formats, from local folders."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from babydoctor.config import TaskConfig
from babydoctor.eval.tasks import (
    CAPTION_PROMPT,
    Question,
    Task,
    closed_or_open,
    load_llava_rows,
    normalize_group,
    read_json,
)
from babydoctor.files import split_lines
from babydoctor.schema import UserError

VQA_RAD_LEAKAGE = (
    "VQA-RAD's official split is by question: 202 of its 203 test images are also in train, so a score on it says "
    "little about new images."
)
_OPTIONAL_PART = re.compile(r"\(([^()]*)\)")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")


def image_folder(config: TaskConfig, root: Path, *names: str) -> Path:
    """The image folder: the user's, or the first of ``names`` that exists, or ``root``."""
    return (
        Path(config.images) if config.images else next((root / name for name in names if (root / name).is_dir()), root)
    )


def _only_file(config: TaskConfig, *patterns: str) -> Path:
    """The data file: ``data`` itself, or the only file in it that matches the first matching pattern."""
    root = Path(config.data)
    if root.is_file():
        return root
    if not root.exists():
        raise UserError(f"--data {root}: no such file or folder; `--data hub` fetches the published copy")
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            raise UserError(f"--data {root}: several files match {pattern}; give one of them: {found[0]}, {found[1]}")
        if found:
            return found[0]
    raise UserError(f"--data {root}: no file named like {' or '.join(patterns)} for --task {config.task}")


def _records(path: Path, *keys: str) -> list[dict[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a {type(rows).__name__}, not a list of questions")
    for number, row in enumerate(rows):
        missing = [key for key in keys if key not in row]
        if missing:
            raise UserError(f"{path}#{number}: the key {missing[0]!r} is missing")
    return rows


def load_vqa_rad(config: TaskConfig) -> Task:
    """Read VQA-RAD's official JSON, or the rows that ``babydoctor data vqa-rad`` wrote from it.

    Splits of the official file: "test" (``phrase_type`` starts with "test_"), "train" and "all".

    Source: Lau et al., Scientific Data 2018; https://osf.io/89kps.
    """
    path = _only_file(config, "*VQA_RAD*.json", "*.json")
    rows = read_json(path)
    if rows and "conversations" in rows[0]:
        official_test = any(str(row.get("phrase_type", "")).startswith("test") for row in rows)
        notes = (VQA_RAD_LEAKAGE,) if official_test else ("Not the official test split.",)
        return replace(load_llava_rows(config.model_copy(update={"data": str(path)})), name="vqa-rad", notes=notes)
    rows = _records(path, "image_name", "question", "answer", "answer_type", "phrase_type")
    images = image_folder(config, path.parent, "images", "VQA_RAD Image Folder")
    split = config.split or "test"
    if split not in ("test", "train", "all"):
        raise UserError(f"--split {split}: VQA-RAD has test, train and all")
    is_test = [str(row["phrase_type"]).startswith("test") for row in rows]
    kept = [split == "all" or test == (split == "test") for test in is_test]
    if not any(kept):
        raise UserError(
            f"{path}: none of its {len(rows)} rows belongs to split {split!r} (by phrase_type); "
            "`babydoctor data vqa-rad --hold-out-images 0.1` holds out a tenth of the images: give its held_out.json"
        )
    questions = tuple(vqa_rad_question(row, number, images) for number, row in enumerate(rows) if kept[number])
    return Task("vqa-rad", questions, (VQA_RAD_LEAKAGE,) if split != "train" else ())


def vqa_rad_question(row: dict[str, Any], number: int, images: Path) -> Question:
    """One object of VQA-RAD's file. Two answers are numbers, and two ``answer_type`` values end in a space."""
    return Question(
        id=f"{row.get('qid', number)}-{number}",
        image=images / row["image_name"],
        image_key=row["image_name"],
        prompt=str(row["question"]).strip(),
        references=(str(row["answer"]).strip(),),
        kind="closed" if str(row["answer_type"]).strip().upper() == "CLOSED" else "open",
        groups={
            "question_type": normalize_group(str(row.get("question_type", ""))),
            "organ": normalize_group(str(row.get("image_organ", ""))),
        },
    )


def load_slake(config: TaskConfig) -> Task:
    """Read SLAKE's ``test.json`` with ``imgs/``. ``language`` selects the questions: "en", "zh" or "all".

    Source: Liu et al., ISBI 2021; https://www.med-vqa.com/slake.
    """
    path = _only_file(config, f"{config.split or 'test'}.json")
    rows = _records(path, "img_name", "question", "answer", "answer_type", "q_lang")
    images = image_folder(config, path.parent, "imgs", "images")
    questions = tuple(
        Question(
            id=str(row.get("qid", number)),
            image=images / row["img_name"],
            image_key=row["img_name"],
            prompt=str(row["question"]).strip(),
            references=(str(row["answer"]).strip(),),
            kind="closed" if str(row["answer_type"]).strip().upper() == "CLOSED" else "open",
            groups={
                "question_type": str(row.get("content_type", "unknown")),
                "organ": str(row.get("location", "unknown")),
                "modality": str(row.get("modality", "unknown")),
            },
        )
        for number, row in enumerate(rows)
        if config.language in ("all", row["q_lang"])
    )
    return Task("slake", questions)


def load_path_vqa(config: TaskConfig) -> Task:
    """Read PathVQA as JSON: a list of ``{"image", "question", "answer"}``. Image names may lack ``.jpg``.

    The authors' own file is a pickle, which can run code when it is loaded, and is refused.

    Source: He et al., ACL 2021; https://github.com/UCSD-AI4H/PathVQA.
    """
    root = Path(config.data)
    if root.suffix == ".pkl" or (any(root.glob("*_qa.pkl")) and not any(root.glob("*.json"))):
        raise UserError(
            f"--data {root}: a pickle can run code and is not loaded. Convert it on a machine you trust "
            "(json.dump(pickle.load(...))), or use --data hub"
        )
    path = _only_file(config, f"*{config.split or 'test'}*.json", "*.json")
    rows = _records(path, "image", "question", "answer")
    images = image_folder(config, path.parent, f"images/{config.split or 'test'}", "images")
    questions = []
    for number, row in enumerate(rows):
        name = str(row["image"])
        references = (str(row["answer"]).strip(),)
        questions.append(
            Question(
                id=str(row.get("id", number)),
                image=images / (name if name.lower().endswith(_IMAGE_SUFFIXES) else f"{name}.jpg"),
                image_key=name,
                prompt=str(row["question"]).strip(),
                references=references,
                kind=closed_or_open(references),
                groups={"question_type": str(row["question"]).split()[0].lower()},
            )
        )
    return Task("path-vqa", tuple(questions))


def load_vqa_med(config: TaskConfig) -> Task:
    """Read ImageCLEF VQA-Med's text files.

    - 2019 test: ``image|category|question|answer``, alternatives separated by "#", text in parentheses optional.
    - 2019 train and validation, 2020: ``image|question|answer``.
    - 2020 and 2021 test: ``image|question`` and a second file ``image|answer|answer...`` (2020 uses "#").

    Source: https://github.com/abachaa/VQA-Med-2019 (and -2020, -2021).
    """
    path = _only_file(config, "*w_Ref_Answers*.txt", "*Test-Questions*.txt", "*[Qq]uestions*.txt", "*QA*[Pp]airs*.txt")
    lines = _split_lines(path)
    width = len(lines[0]) if lines else 0
    answers: dict[str, list[str]] = {}
    if width == 2:
        reference_file = next(iter(sorted(path.parent.glob("*Reference*Answers*.txt"))), None)
        if reference_file is None:
            raise UserError(f"{path}: has questions only, and there is no *ReferenceAnswers*.txt next to it")
        answers = {fields[0]: fields[1:] for fields in _split_lines(reference_file)}
    images = image_folder(config, path.parent, *(folder.name for folder in sorted(path.parent.glob("*[Ii]mages*"))))
    questions = []
    for number, fields in enumerate(lines):
        name, category, text, raw = _vqa_med_fields(path, number, fields, answers)
        alternatives = [part.strip() for field in raw for part in field.split("#")]
        references = tuple(dict.fromkeys(v for part in alternatives for v in with_optional_parts(part, width == 4)))
        questions.append(
            Question(
                id=f"{name}-{number}",
                image=_with_suffix(images, name),
                image_key=name,
                prompt=text.strip(),
                references=references,
                kind=closed_or_open(references),
                groups={"question_type": category},
            )
        )
    return Task("vqa-med", tuple(questions))


def _split_lines(path: Path) -> list[list[str]]:
    return [line.split("|") for line in split_lines(path.read_text(encoding="utf-8-sig")) if line.strip()]


def _vqa_med_fields(
    path: Path, number: int, fields: list[str], answers: dict[str, list[str]]
) -> tuple[str, str, str, list[str]]:
    if len(fields) == 4:
        return fields[0], fields[1], fields[2], [fields[3]]
    if len(fields) == 3:
        return fields[0], "unknown", fields[1], [fields[2]]
    if len(fields) == 2 and fields[0] in answers:
        return fields[0], "abnormality", fields[1], answers[fields[0]]
    raise UserError(f"{path}:{number + 1}: {len(fields)} fields between '|', or no reference answer for {fields[0]!r}")


def with_optional_parts(answer: str, optional: bool) -> list[str]:
    """All variants of a reference: with and without each text in parentheses, or only the text if not ``optional``."""
    parts = _OPTIONAL_PART.split(answer)
    if not optional or len(parts) == 1:
        return [answer]
    variants = []
    # split() puts the texts in parentheses at odd indices.
    for kept in itertools.product((True, False), repeat=len(parts) // 2):
        words = (part for index, part in enumerate(parts) if index % 2 == 0 or kept[index // 2])
        variants.append(" ".join(" ".join(words).split()))
    return [variant for variant in variants if variant]


def _with_suffix(images: Path, name: str) -> Path:
    candidates = [images / f"{name}{suffix}" for suffix in _IMAGE_SUFFIXES]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def load_roco(config: TaskConfig) -> Task:
    """Read ROCO captions: a folder with ``captions.txt``, ``licences.txt`` and ``images/``.

    Captions without an image are left out, and a note says how many. If ``train`` names folders of the same layout, the
    test rows whose article (PMC id) is not in train are also scored on their own, as the subset ``article_disjoint``.

    Source: Pelka et al., LABELS 2018; https://github.com/razorx89/roco-dataset.
    """
    root = Path(config.data)
    images = image_folder(config, root, "images")
    captions = read_captions(root / "captions.txt")
    article = read_articles(root / "licences.txt")
    folders = [Path(folder) for folder in config.train if (Path(folder) / "licences.txt").is_file()]
    train_articles = {name for folder in folders for name in read_articles(folder / "licences.txt").values()}
    questions, num_without_image = [], 0
    for key, caption in captions.items():
        image = images / f"{key}.jpg"
        if not image.is_file():
            num_without_image += 1
            continue
        disjoint = bool(folders) and key in article and article[key] not in train_articles
        subsets = ("article_disjoint",) if disjoint else ()
        questions.append(
            Question(key, image, key, CAPTION_PROMPT, (caption,), "caption", {}, subsets, article.get(key, ""))
        )
    notes = ["Intervals resample articles, because the images of an article are similar."]
    if num_without_image:
        notes.append(f"{num_without_image} captions have no image in {images} and are left out.")
    if folders:
        num_shared = sum(not question.subsets for question in questions)
        notes.append(f"{num_shared} of {len(questions)} images share an article with train; the rest is a subset.")
    else:
        notes.append("Articles shared with train are unknown; give the train folder with --train.")
    return Task("roco", tuple(questions), tuple(notes))


def read_captions(path: Path) -> dict[str, str]:
    """Read ROCO's ``captions.txt``: id, tab, caption."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; --data for roco is a folder with captions.txt, licences.txt, images/")
    captions = {}
    for number, line in enumerate(split_lines(path.read_text(encoding="utf-8")), start=1):
        key, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"{path}:{number}: no tab between id and caption")
        captions[key.strip()] = caption.strip()
    return captions


def read_articles(path: Path) -> dict[str, str]:
    """Read ROCO's ``licences.txt``: id to PMC id (``PMC2766744_cios-1-176-g005.jpg`` -> ``PMC2766744``)."""
    if not path.is_file():
        return {}
    rows = (line.split(",") for line in split_lines(path.read_text(encoding="utf-8"))[1:])
    return {fields[0]: fields[1].split("_")[0] for fields in rows if len(fields) >= 2}
