"""Write the three training sets in their published layouts, filled with phantoms.

Run as a program: ``python -m babydoctor.bench.rehearse.data_sets PHANTOMS OUT``, where ``PHANTOMS`` was written by
``babydoctor data phantom``. Writes ``OUT/lcs``, ``OUT/instruct`` and ``OUT/roco`` as ``babydoctor data lcs``,
``instruct`` and ``roco`` take them with ``--source``.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from babydoctor.data.sets import instruct, lcs

ROCO_SPLITS = {"train": "train", "validation": "held_out"}
"""ROCO's split and the phantoms' split that fills it."""

MIN_EDGE, MAX_EDGE = 40, 96


def write_sets(phantoms: Path, out: Path) -> None:
    """Write the original files of the three sets."""
    write_lcs(phantoms, out / "lcs")
    write_instruct(phantoms, out / "instruct")
    write_roco(phantoms, out / "roco")


def write_lcs(phantoms: Path, folder: Path) -> None:
    """``blip_laion_cc_sbu_558k.json`` and ``images.zip``: rows with an image in a numbered folder."""
    folder.mkdir(parents=True)
    rows = []
    with zipfile.ZipFile(folder / lcs.IMAGES_ARCHIVE, "w") as archive:
        for number, row in enumerate(_read_rows(phantoms, "align", "train")):
            id = f"{number:09d}"
            name = f"{id[:5]}/{id}.jpg"
            archive.writestr(name, _jpeg(phantoms, row["image"], number))
            rows.append({"id": id, "image": name, "conversations": row["conversations"]})
    (folder / lcs.ROWS_FILE).write_text(json.dumps(rows), encoding="utf-8")


def write_instruct(phantoms: Path, folder: Path) -> None:
    """``llava_instruct_80k.json`` and COCO's ``train2017.zip``: conversations of several turns."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    for row in _read_rows(phantoms, "instruct", "train"):
        if "image" not in row:
            continue  # every published row has an image
        number = names.setdefault(row["image"], len(names))
        id = f"{number:012d}"
        rows.append({"id": id, "image": f"{id}.jpg", "conversations": row["conversations"]})
    (folder / instruct.ROWS_FILE).write_text(json.dumps(rows), encoding="utf-8")
    with zipfile.ZipFile(folder / instruct.IMAGES_ARCHIVE, "w") as archive:
        for image, number in names.items():
            archive.writestr(f"train2017/{number:012d}.jpg", _jpeg(phantoms, image, number))


def write_roco(phantoms: Path, folder: Path) -> None:
    """ROCO's ``data/SPLIT/radiology`` with ``captions.txt``, ``licences.txt`` and ``images/``."""
    number = 0
    for split, source in ROCO_SPLITS.items():
        target = folder / "data" / split / "radiology"
        (target / "images").mkdir(parents=True)
        captions, licences = [], ["ROCO_ID,PMC_ID,LICENCE"]
        for row in _read_rows(phantoms, "radiology", source):
            if not row["id"].endswith("-report"):
                continue
            number += 1
            name = f"ROCO_{number:05d}"
            (target / "images" / f"{name}.jpg").write_bytes(_jpeg(phantoms, row["image"], number))
            captions.append(f"{name}\t {row['conversations'][1]['value']}")
            licences.append(f"{name},PMC{3970000 + number}_figure.jpg,CC BY")
        (target / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        (target / "licences.txt").write_text("\n".join(licences) + "\n", encoding="utf-8")


def _read_rows(phantoms: Path, name: str, split: str) -> list[dict[str, Any]]:
    return json.loads((phantoms / f"{name}_{split}.json").read_text(encoding="utf-8"))


def _jpeg(phantoms: Path, image: str, number: int) -> bytes:
    """A phantom as JPEG. The aspect ratios vary, because the sets' images are rarely square."""
    with Image.open(phantoms / "images" / image) as picture:
        size = MAX_EDGE, MIN_EDGE + 17 * number % (MAX_EDGE - MIN_EDGE)
        shape = size if number % 2 else size[::-1]
        file = io.BytesIO()
        picture.convert("RGB").resize(shape).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    write_sets(Path(sys.argv[1]), Path(sys.argv[2]))
