"""MIMIC-CXR: 377,110 chest radiographs of 227,835 studies with their reports, as PhysioNet distributes them.

Johnson et al., "MIMIC-CXR, a de-identified publicly available database of chest radiographs with free-text reports",
Scientific Data 2019; images as JPEG from MIMIC-CXR-JPG. Only credentialed users have access, so nothing is downloaded
here. The published split is by patient.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

from babydoctor.data.sets.files import PreparedSplit
from babydoctor.data.sets.reports import SECTIONS, Section, build_answer, build_row, parse_sections
from babydoctor.data.sets.splits import SplitWriter
from babydoctor.progress import show_progress
from babydoctor.schema import UserError

SPLIT_FILE = "mimic-cxr-2.0.0-split.csv"
METADATA_FILE = "mimic-cxr-2.0.0-metadata.csv"
NUM_IMAGES = {"train": 368_960, "validation": 2_991, "test": 5_159}
FRONTAL_VIEWS = ("PA", "AP")
PUBLISHED_SPLITS = {"test": "test", "validate": "validation", "train": "train"}


class Radiograph(NamedTuple):
    """An image of the published lists. ``split`` is ours, ``view`` is DICOM's ViewPosition and may be empty."""

    dicom: str
    study: str
    patient: str
    split: str
    view: str

    @property
    def folder(self) -> str:
        return f"p{self.patient[:2]}/p{self.patient}/s{self.study}"


def prepare_mimic_cxr(
    source: Path,
    out: Path,
    *,
    reports: Path | None = None,
    section: str = "both",
    views: Sequence[str] = FRONTAL_VIEWS,
    copy: bool = False,
) -> list[PreparedSplit]:
    """Write ``out/{train,validation,test}.json``: a row for each image of ``views`` whose report has the section.

    Args:
        source: the folder of MIMIC-CXR-JPG: ``files/p10/p10000032/s50414267/*.jpg``, and the lists of splits and
            metadata (``.csv.gz`` or ``.csv``).
        reports: the folder of MIMIC-CXR with ``files/p10/p10000032/s50414267.txt``; None: ``source``.
        section: ``findings``, ``impression`` or ``both``.
        views: view positions to keep; empty: all.

    Raises:
        UserError: a list or folder is missing or not as published.
    """
    if section not in SECTIONS:
        raise UserError(f"--section {section}: must be one of {', '.join(SECTIONS)}")
    images, texts = source / "files", find_reports(reports or source)
    if not images.is_dir():
        raise UserError(f"{images}: no such directory; --source is the folder of MIMIC-CXR-JPG, which holds files/")
    radiographs = read_radiographs(source)
    num_blanked = 0
    with SplitWriter(out, images, group="patient") as writer:
        for name in ("test", "validation", "train"):
            chosen = [radiograph for radiograph in radiographs if radiograph.split == name]
            for radiograph in show_progress(chosen, f"reading reports ({name})"):
                report = texts / f"{radiograph.folder}.txt"
                if views and radiograph.view not in views:
                    writer.leave_out(name, "other_view", radiograph.dicom, radiograph.view or "view unknown")
                    continue
                if not report.is_file():
                    writer.leave_out(name, "no_report", radiograph.dicom, f"{radiograph.folder}.txt")
                    continue
                sections = parse_sections(_read_report(report))
                answer = build_answer(sections, cast(Section, section))
                if not answer:
                    missing = "no_section" if section == "both" else f"no_{section}"
                    writer.leave_out(name, missing, radiograph.dicom, f"{radiograph.folder}.txt")
                    continue
                image = f"{radiograph.folder}/{radiograph.dicom}.jpg"
                row = build_row(radiograph.dicom, image, answer, cast(Section, section))
                num_blanked += writer.add(name, row, radiograph.patient) and "___" in answer
    note = f"{num_blanked:,} answers hold ___, where PhysioNet removed a name, a date or a number"
    return writer.finish(copy=copy, expected=NUM_IMAGES, notes=(note,) if num_blanked else ())


def find_reports(folder: Path) -> Path:
    """The folder with ``p10/p10000032/s50414267.txt``. Raises ``UserError`` that names the folders searched."""
    places = [folder / "files", folder / "mimic-cxr-reports" / "files", folder]
    for place in places:
        if next(place.glob("p1[0-9]/p*/s*.txt"), None) is not None:
            return place
    looked = ", ".join(map(str, places))
    raise UserError(f"{folder}: no reports (p10/p10000032/s50414267.txt); looked in {looked}; unpack mimic-cxr-reports")


def read_radiographs(source: Path) -> list[Radiograph]:
    """Every image of the list of splits, in its order. Raises ``UserError`` for a file that is not as published."""
    views = {
        line["dicom_id"]: line["ViewPosition"]
        for line in show_progress(_read_csv(source, METADATA_FILE, ("dicom_id", "ViewPosition")), "reading views")
    }
    found = []
    columns = ("dicom_id", "study_id", "subject_id", "split")
    for line in show_progress(_read_csv(source, SPLIT_FILE, columns), "reading splits"):
        dicom, study, patient, split = (line[column] for column in columns)
        if split not in PUBLISHED_SPLITS:
            raise UserError(f"{source}/{SPLIT_FILE}: split {split!r} of {dicom}: must be train, validate or test")
        if dicom not in views:
            raise UserError(f"{source}/{METADATA_FILE}: has no line for {dicom}, which {SPLIT_FILE} names")
        found.append(Radiograph(dicom, study, patient, PUBLISHED_SPLITS[split], views[dicom]))
    return found


def _read_report(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); download it again") from error


def _read_csv(folder: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The lines of ``name`` or ``name.gz`` in a folder. Raises ``UserError`` for a missing file or column."""
    packed, plain = folder / f"{name}.gz", folder / name
    path = packed if packed.is_file() else plain
    if not path.is_file():
        raise UserError(f"{packed}: no such file; download it with MIMIC-CXR-JPG from PhysioNet")
    try:
        with _open_text(path) as file:
            lines = csv.DictReader(file)
            missing = [column for column in columns if column not in (lines.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: has no column {missing[0]}; its columns are {lines.fieldnames}")
            for line in lines:
                if any(line[column] is None for column in columns):
                    raise UserError(f"{path}:{lines.line_num}: the line is cut off; download the file again")
                yield line
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); download it again") from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
