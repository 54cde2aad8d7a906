"""roco-instruct: radiology images of open-access articles with their captions, as instruction rows.

Made from the files of the ROCO project (Pelka et al., 2018), or read from photonmz/roco-instruct-65k on the hub, which
has the same rows without images. ROCO's images have the licenses of their articles, so none are shipped with the code.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from babydoctor.data.sets.files import PreparedSplit, gather_images, prepare_llava_rows, write_left_out, write_rows
from babydoctor.data.sets.hub import copy_sources, download_hub_snapshot
from babydoctor.data.sources import iter_rows
from babydoctor.progress import show_progress
from babydoctor.schema import IMAGE_TOKEN, UserError

INSTRUCTION = f"The following image is a radiology scan. Deeply analyze and diagnose this image.\n{IMAGE_TOKEN}"
SPLITS = ("train", "validation", "test")
NUM_CAPTIONS = {"train": 65_448, "validation": 8_180, "test": 8_179}
"""Radiology rows in ROCO's captions.txt. Some of their images can no longer be downloaded."""

HUB_REPO = "photonmz/roco-instruct-65k"
NUM_HUB_ROWS = {"train": 65_422, "validation": 8_174, "test": 8_176}

_CAPTION_LINE = re.compile(r"ROCO_(\d+)\t(.*)")


def find_split(source: Path, split: str | None) -> Path:
    """The folder with ``captions.txt`` of a split: ROCO's root, its ``data``, a split's folder or ``radiology`` itself.

    Raises ``UserError`` that names the folders searched.
    """
    below = [source / split, source / "data" / split] if split else []
    places = [place / kind for place in [*below, source] for kind in ("radiology", ".")]
    for place in places:
        if (place / "captions.txt").is_file():
            return place
    looked = ", ".join(str(place) for place in places if place.name != ".")
    raise UserError(f"{source}: no captions.txt of ROCO's radiology part; looked in {looked}")


def read_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of ``captions.txt`` as (digits after ROCO_, caption). Raises ``UserError`` naming the line."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            match = _CAPTION_LINE.fullmatch(line.rstrip("\r\n"))
            if match is None:
                raise UserError(f"{path}:{number}: must be ROCO_<digits><tab> caption, is {line[:60]!r}")
            yield match[1], match[2].strip()


def read_articles(folder: Path) -> dict[str, str]:
    """Digits after ROCO_ -> PMC id of the article, from ``licences.txt``."""
    path = folder / "licences.txt"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it tells which article an image is from, --disjoint-from needs it")
    articles = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            name, figure = line.get("ROCO_ID") or "", line.get("PMC_ID") or ""
            article = re.match(r"PMC\d+", figure)
            if not name.startswith("ROCO_") or article is None:
                raise UserError(f"{path}: must hold lines such as ROCO_00020,PMC3970251_figure.jpg,CC BY; found {line}")
            articles[name.removeprefix("ROCO_")] = article[0]
    return articles


def build_row(digits: str, caption: str) -> dict[str, Any]:
    """One caption as a row of roco-instruct."""
    return {
        "id": digits,
        "image": f"ROCO_{digits}.jpg",
        "conversations": [{"from": "human", "value": INSTRUCTION}, {"from": "gpt", "value": caption}],
    }


def prepare_roco(
    source: Path, split: str, out: Path, *, disjoint_from: Sequence[Path] = (), copy: bool = False
) -> PreparedSplit:
    """Write ``out/{split}.json`` from ROCO's files: one row per caption whose JPEG exists.

    The images are linked or copied into ``out/images``, which all splits can share because ROCO's numbers are unique.
    ``disjoint_from`` names folders of other splits; rows whose article also appears there are left out. Rows left out
    and JPEGs without a caption are listed in ``out/{split}-left-out.jsonl``.
    """
    check_split(split)
    folder = find_split(source, split)
    images = folder / "images"
    if not images.is_dir():
        raise UserError(f"{images}: no such directory; ROCO's own fetch script downloads the images into it")
    others = {article for other in disjoint_from for article in read_articles(find_split(other, None)).values()}
    articles = read_articles(folder) if others else {}
    present = {path.name for path in images.iterdir() if path.suffix.lower() == ".jpg"}
    rows, left_out, known = [], [], set()
    for digits, caption in show_progress(read_captions(folder / "captions.txt"), "reading captions"):
        row = build_row(digits, caption)
        known.add(row["image"])
        reason = "no_image" if row["image"] not in present else "no_caption" if not caption else ""
        if not reason and others:
            article = articles.get(digits)
            reason = "article_unknown" if article is None else "article_shared" if article in others else ""
        if reason:
            left_out.append({"reason": reason, "id": digits, "image": row["image"]})
        else:
            rows.append(row)
    num_read = len(known)
    left_out += [{"reason": "image_without_row", "id": "", "image": name} for name in sorted(present - known)]
    list_path = out / f"{split}-left-out.jsonl"
    kept_images = [row["image"] for row in rows]
    return PreparedSplit(
        rows=out / f"{split}.json",
        images=gather_images(images, out, kept_images, copy=copy),
        num_rows=write_rows(out / f"{split}.json", rows),
        num_images=len(set(kept_images)),
        num_read=num_read,
        num_expected=NUM_CAPTIONS[split],
        left_out=write_left_out(list_path, left_out),
        left_out_list=list_path,
    )


def prepare_roco_from_hub(source: Path | None, split: str, out: Path, *, copy: bool = False) -> PreparedSplit:
    """Write ``out/{split}.json`` from the hub set. The hub has no images: ``source`` is ROCO's folder with them.

    The downloaded files stay in ``out/roco-instruct-65k``. Files that were put there by hand are used instead.
    Raises ``UserError`` if the download fails, the number of rows is not the published one, or there are no images.
    """
    check_split(split)
    folder = download_hub_snapshot(HUB_REPO, out / "roco-instruct-65k")
    rows = list(iter_rows(f"{folder}:{split}"))
    if len(rows) != NUM_HUB_ROWS[split]:
        raise UserError(
            f"{folder}: split {split} has {len(rows):,} rows, published are {NUM_HUB_ROWS[split]:,}; "
            "remove the folder and download it again"
        )
    if source is None:
        raise UserError(
            f"the rows of {HUB_REPO} are in {folder}; their images come from the ROCO project "
            "(https://github.com/razorx89/roco-dataset): fetch them and name the folder with --source"
        )
    images = find_split(source, split) / "images"
    copy_sources(folder, out)
    return prepare_llava_rows(
        iter(rows), images, out, name=split, num_expected=NUM_HUB_ROWS[split], copy=copy, share=True
    )


def check_split(split: str) -> None:
    """Raises ``UserError`` for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
