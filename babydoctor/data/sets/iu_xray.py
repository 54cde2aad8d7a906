"""Indiana University's chest radiographs (Open-i): 7,470 images with 3,955 reports.

Demner-Fushman et al., "Preparing a collection of radiology examinations for distribution and retrieval", JAMIA 2016.
Read from Open-i's own files (``ecgen-radiology/*.xml`` and PNG files), or from R2Gen's ``annotation.json``. No two
reports are of the same patient. Open-i publishes no split; R2Gen does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast
from xml.etree import ElementTree

from babydoctor.data.sets.files import PreparedSplit
from babydoctor.data.sets.reports import SECTIONS, Section, build_answer, build_row
from babydoctor.data.sets.splits import SplitWriter, held_out
from babydoctor.progress import show_progress
from babydoctor.schema import UserError

NUM_IMAGES = 7_470
ANNOTATION_FILE = "annotation.json"
R2GEN_SPLITS = {"test": "test", "val": "validation", "train": "train"}


class Examination(NamedTuple):
    """A report and its images. ``images`` are paths inside the image folder. ``id`` identifies the patient."""

    id: str
    sections: dict[str, str]
    images: list[str]


def prepare_iu_xray(
    source: Path,
    out: Path,
    *,
    section: str = "both",
    hold_out: float = 0.0,
    seed: int = 0,
    first_image: bool = False,
    copy: bool = False,
) -> list[PreparedSplit]:
    """Write ``out/train.json`` and, with ``hold_out`` or R2Gen's file, the other splits: a row for each image.

    Args:
        source: holds ``ecgen-radiology/`` and the PNG files, or ``annotation.json`` and ``images/`` as R2Gen has them.
        section: ``findings``, ``impression`` or ``both``. R2Gen's file has findings only.
        hold_out: share of the reports that become ``test.json``; 0 with R2Gen's file, which has its own splits.
        first_image: leave out all but the first image of a report.

    Raises:
        UserError: the files are not there or not as published.
    """
    if section not in SECTIONS:
        raise UserError(f"--section {section}: must be one of {', '.join(SECTIONS)}")
    if not 0 <= hold_out < 1:
        raise UserError(f"--hold-out {hold_out}: must be at least 0 and below 1")
    if (source / ANNOTATION_FILE).is_file():
        if hold_out or section == "impression":
            option = "--hold-out" if hold_out else "--section impression"
            raise UserError(
                f"{option} does not go with R2Gen's {ANNOTATION_FILE}, which has its own splits of findings"
            )
        return _prepare_r2gen(source, out, cast(Section, "findings"), first_image, copy)
    examinations = list(read_examinations(source))
    images = _find_images(source, [image for examination in examinations for image in examination.images])
    splits = {"test": lambda id: held_out(id, hold_out, seed), "train": lambda id: not held_out(id, hold_out, seed)}
    with SplitWriter(out, images, group="patient") as writer:
        for name, belongs in splits.items():
            for examination in examinations:
                if belongs(examination.id):
                    _add(writer, name, examination, cast(Section, section), first_image, examination.id)
    return writer.finish(copy=copy, expected=None if hold_out else {"train": NUM_IMAGES})


def _add(
    writer: SplitWriter, name: str, examination: Examination, section: Section, first_image: bool, patient: str
) -> None:
    answer = build_answer(examination.sections, section)
    if not examination.images:
        writer.leave_out(name, "no_image", examination.id)
    for number, image in enumerate(examination.images):
        id = Path(image).with_suffix("").as_posix()
        if not answer:
            writer.leave_out(name, "no_section" if section == "both" else f"no_{section}", id)
        elif number and first_image:
            writer.leave_out(name, "other_image", id, f"of {examination.id}")
        else:
            writer.add(name, build_row(id, image, answer, section), patient)


def read_examinations(source: Path) -> Iterator[Examination]:
    """Open-i's reports in order of their numbers. Raises ``UserError`` if there are none or one is damaged."""
    folder = next((path for path in (source / "ecgen-radiology", source) if next(path.glob("*.xml"), None)), None)
    folder = folder or next(iter(sorted(source.glob("*/ecgen-radiology"))), None)
    if folder is None:
        raise UserError(
            f"{source}: holds neither Open-i's ecgen-radiology/*.xml (NLMCXR_reports.tgz) nor R2Gen's {ANNOTATION_FILE}"
        )
    paths = sorted(folder.glob("*.xml"), key=lambda path: (len(path.stem), path.stem))
    for path in show_progress(paths, "reading reports"):
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise UserError(f"{path}: not valid XML ({error}); unpack NLMCXR_reports.tgz again") from error
        identity = root.find("uId")
        sections = {}
        for text in root.iter("AbstractText"):
            content = " ".join("".join(text.itertext()).split())
            if content:
                sections[text.get("Label", "").lower()] = content
        images = [f"{image.get('id')}.png" for image in root.iter("parentImage")]
        yield Examination(path.stem if identity is None else str(identity.get("id")), sections, images)


def _find_images(source: Path, names: list[str]) -> Path:
    """The folder with the PNG files, found by the first of them that exists."""
    folders = [source / "NLMCXR_png", source / "images", source, *sorted(p for p in source.iterdir() if p.is_dir())]
    for name in names[:100]:
        for folder in folders:
            if (folder / name).is_file():
                return folder
    looked = ", ".join(str(folder) for folder in folders[:3])
    raise UserError(f"{source}: the PNG files are not here ({names[:1]}); looked in {looked}; unpack NLMCXR_png.tgz")


def _prepare_r2gen(source: Path, out: Path, section: Section, first_image: bool, copy: bool) -> list[PreparedSplit]:
    """R2Gen's file: ``{"train": [{"id", "report", "image_path": [...]}], "val": [...], "test": [...]}``."""
    path, images = source / ANNOTATION_FILE, source / "images"
    if not images.is_dir():
        raise UserError(f"{images}: no such directory; R2Gen's images belong next to {ANNOTATION_FILE}")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        published = {
            ours: [
                Examination(e["id"], {"findings": " ".join(e["report"].split())}, e["image_path"]) for e in loaded[t]
            ]
            for t, ours in R2GEN_SPLITS.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not R2Gen's annotation of IU X-ray ({error!r}); download it again") from error
    with SplitWriter(out, images, group="patient") as writer:
        for name, examinations in published.items():
            for examination in show_progress(examinations, f"reading reports ({name})"):
                patient = re.match(r"CXR\d+", examination.id)
                _add(writer, name, examination, section, first_image, patient[0] if patient else examination.id)
    return writer.finish(copy=copy)
