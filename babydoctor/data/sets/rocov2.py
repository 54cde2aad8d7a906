"""ROCOv2: 79,789 radiology images of open-access articles with their captions, as instruction rows.

Rückert et al., "ROCOv2: Radiology Objects in COntext version 2, an updated multimodal image dataset", Scientific Data
2024; https://zenodo.org/records/10821435. The question is that of roco-instruct (``roco.py``).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from babydoctor.data.sets.files import PreparedSplit, gather_images, write_left_out, write_rows
from babydoctor.data.sets.roco import INSTRUCTION, check_split
from babydoctor.progress import show_progress
from babydoctor.schema import UserError

NUM_CAPTIONS = {"train": 59_958, "validation": 9_904, "test": 9_927}
PUBLISHED_NAMES = {"train": "train", "validation": "valid", "test": "test"}
LICENSE_FILE = "license_information.csv"


def prepare_rocov2(
    source: Path, split: str, out: Path, *, disjoint_from: Sequence[str] = (), copy: bool = False
) -> PreparedSplit:
    """Write ``out/{split}.json``: a row for each line of ``{split}_captions.csv`` whose JPEG is there.

    Args:
        source: holds ``{train,valid,test}_captions.csv`` (columns ``ID``, ``Caption``) and the folders ``train``,
            ``valid`` and ``test`` with ``ID.jpg``.
        disjoint_from: other splits; rows whose article (``license_information.csv``) also appears there are left out.

    Raises:
        UserError: a file or folder is missing or not as published.
    """
    check_split(split)
    published = PUBLISHED_NAMES[split]
    images = _find_images(source, published)
    others: set[str] = set()
    articles: dict[str, str] = {}
    if disjoint_from:
        articles = read_articles(source)
        for other in disjoint_from:
            check_split(other)
            ids = (id for id, _ in read_captions(source / f"{PUBLISHED_NAMES[other]}_captions.csv"))
            others |= {articles[id] for id in ids if id in articles}
    present = {path.name for path in images.iterdir() if path.suffix.lower() == ".jpg"}
    rows, names, left_out, known = [], list[str](), [], set()
    for id, caption in show_progress(read_captions(source / f"{published}_captions.csv"), "reading captions"):
        image = f"{id}.jpg"
        reason = "duplicate_id" if image in known else "no_image" if image not in present else ""
        reason = reason or ("" if caption else "no_caption")
        if not reason and others:
            reason = "article_unknown" if id not in articles else "article_shared" if articles[id] in others else ""
        known.add(image)
        if reason:
            left_out.append({"reason": reason, "id": id, "image": image})
        else:
            turns = [{"from": "human", "value": INSTRUCTION}, {"from": "gpt", "value": caption}]
            rows.append({"id": id, "image": image, "conversations": turns})
            names.append(image)
    num_read = len(rows) + len(left_out)
    left_out += [{"reason": "image_without_row", "id": "", "image": name} for name in sorted(present - known)]
    list_path = out / f"{split}-left-out.jsonl"
    return PreparedSplit(
        rows=out / f"{split}.json",
        images=gather_images(images, out, names, copy=copy),
        num_rows=write_rows(out / f"{split}.json", rows),
        num_images=len(names),
        num_read=num_read,
        num_expected=NUM_CAPTIONS[split],
        left_out=write_left_out(list_path, left_out),
        left_out_list=list_path,
    )


def read_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of ``*_captions.csv`` as (ID, caption). Raises ``UserError`` naming the line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; it is part of ROCOv2 (https://zenodo.org/records/10821435)")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file)
        if not {"ID", "Caption"} <= set(lines.fieldnames or ()):
            raise UserError(f"{path}: must have the columns ID and Caption; has {lines.fieldnames}")
        for line in lines:
            if not line["ID"] or line["Caption"] is None or None in line:
                raise UserError(f"{path}:{lines.line_num}: must be ID,Caption (quoted if it holds a comma)")
            yield line["ID"].strip(), " ".join(line["Caption"].split())


def read_articles(source: Path) -> dict[str, str]:
    """ID of an image -> PMC id of its article, from the lines of ``license_information.csv`` that name one."""
    path = source / LICENSE_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; --disjoint-from needs it to find the article of each image")
    articles = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        columns = next(lines, [])
        for line in lines:
            id = next((cell for cell in line if cell.startswith("ROCOv2_")), "")
            article = next((match[0] for cell in line if (match := re.search(r"PMC\d+", cell))), "")
            if id and article:
                articles[id.removesuffix(".jpg")] = article
    if not articles:
        raise UserError(f"{path}: names no article (PMC...) for any ROCOv2_ image; its columns are {columns}")
    return articles


def _find_images(source: Path, published: str) -> Path:
    """The folder of a split's images: ``train``, or ``train_images`` if the archive was unpacked under its name."""
    places = [source / published, source / f"{published}_images" / published, source / f"{published}_images"]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"{source}: no image folder; looked for {', '.join(map(str, places))}; unpack the archive")
