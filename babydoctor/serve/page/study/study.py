"""A study: the series of files that were loaded together, and the files that could not be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from babydoctor.imaging.isolation import read_facts
from babydoctor.imaging.limits import ImageError
from babydoctor.imaging.series import SliceFacts, group_slices, hash_of
from babydoctor.serve.page.pacs.client import PacsClient
from babydoctor.serve.page.scan import Scan, open_scan
from babydoctor.serve.page.study.archive import Refused, is_archive
from babydoctor.serve.page.study.reasons import CODES, ORDERS
from babydoctor.serve.page.study.stack import FILE_NAME, Stack, StackFile
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.uploads import MAX_UPLOAD_BYTES


@dataclass
class Series:
    """One series. ``scan`` keeps its window and position while another series is shown.

    Attributes:
        thumbnail: the middle image, as a data URL.
        study: number of the study among those of its patient, from 1, newest first.
        days_before: days before the newest study; None if a date is missing.
        patient: number of the patient, from 1.
    """

    scan: Scan
    stack: Stack
    thumbnail: str
    patient: int = 1
    study: int = 1
    days_before: int | None = None

    @property
    def label(self) -> str:
        return self.stack.group.label

    @property
    def size(self) -> str:
        count = len(self.stack)
        return f"{count} {self.stack.noun}{'s' if count != 1 else ''}"

    @property
    def notes(self) -> list[str]:
        """How the series is sorted, and irregularities of its positions."""
        group = self.stack.group
        if len(self.stack) == 1:
            return []
        notes = ["in the order of the file" if self.stack.is_multi_frame else ORDERS[group.order]]
        if group.num_gaps:
            notes.append(f"{group.num_gaps} gap{'s' if group.num_gaps > 1 else ''}: images may be missing")
        if group.num_repeated:
            notes.append(f"{group.num_repeated} images share the position of the one before")
        return notes


@dataclass
class Study:
    """Files that were loaded together. They may be of several studies and patients.

    Attributes:
        unread: code of ``reasons.UNREAD`` -> number of files that are not shown.
        shown: index of the series that the model receives.
        second: index of the series in the second viewport; None while it is closed.
        origin: the PACS that the files were fetched from.
        extends_loaded: the files include those of the study that was loaded at the request.
    """

    series: list[Series]
    unread: Counter[str] = field(default_factory=Counter)
    shown: int = 0
    second: int | None = None
    origin: PacsClient | None = field(default=None, repr=False)
    extends_loaded: bool = False

    def keep_shown(self, before: Study) -> bool:
        """Take over how the series of an earlier study are shown, and show a new one in the second viewport.

        Returns False, and changes nothing, if the series that was shown is not among those of this study.
        """
        old = {_hashes(one): one for one in before.series}
        hashes = [_hashes(one) for one in self.series]
        wanted = _hashes(before.series[before.shown])
        if wanted not in hashes:
            return False
        for one, files in zip(self.series, hashes, strict=True):
            if files in old:
                one.scan, one.stack = old[files].scan, old[files].stack
        self.shown = hashes.index(wanted)
        self.second = next((index for index, files in enumerate(hashes) if files not in old), None)
        return True

    @property
    def num_bytes(self) -> int:
        return sum(one.stack.num_bytes for one in self.series)

    @property
    def has_several_studies(self) -> bool:
        return len({(one.patient, one.study) for one in self.series}) > 1

    @property
    def has_several_patients(self) -> bool:
        return len({one.patient for one in self.series}) > 1

    def is_same_examination(self, one: int, other: int) -> bool:
        """True for series of one study of one patient."""
        a, b = self.series[one], self.series[other]
        return (a.patient, a.study) == (b.patient, b.study)


class StudyReader:
    """Reads the files of a study one by one, in decoding processes.

    The order of calls matters only if positions and image numbers are missing.
    """

    def __init__(self) -> None:
        self.unread: Counter[str] = Counter()
        self._files: list[StackFile] = []
        self._listed: set[str] = set()
        self._seen: set[str] = set()

    def add(self, file: bytes | Refused) -> None:
        """Read the header of one file."""
        if isinstance(file, Refused):
            self.unread[file.code] += 1
            return
        if is_archive(file) or len(file) > MAX_UPLOAD_BYTES:
            self.unread["nested_archive" if is_archive(file) else "too_large"] += 1
            return
        content = hash_of(file)
        if content in self._seen:
            self.unread["copy"] += 1
            return
        self._seen.add(content)
        try:
            facts = read_facts(file, name=FILE_NAME)
        except ImageError as error:
            self.unread[CODES.get(error.code, "damaged")] += 1
            return
        if facts.kind == "directory":
            self._listed.update(facts.listed)
        else:
            self._files.append(StackFile(file, facts))

    def study(self) -> Study:
        """Group the files into series. Series of the newest study come first.

        Raises:
            PageError: there is no image.
        """
        read = {file.facts.instance for file in self._files}
        # A file that cannot be read may be one that a DICOMDIR lists.
        missing = len(self._listed - read) - sum(self.unread.values())
        if missing > 0:
            self.unread["not_sent"] = missing
        numbers = _number_studies([file.facts for file in self._files])
        series: list[Series] = []
        for group in group_slices([file.facts for file in self._files]):
            stack = Stack([self._files[index] for index in group.slices], group)
            try:
                scan = open_stack(stack)
            except PageError:
                self.unread["damaged"] += len(stack.files)
                continue
            thumbnail = scan.view().thumbnail
            patient, study, days_before = numbers[stack.facts.patient, stack.facts.study]
            series.append(Series(scan, stack, thumbnail, patient, study, days_before))
        if not series:
            raise PageError("directory_alone" if self._listed else "study_empty")
        series.sort(key=lambda one: (one.patient, one.study))
        # Series with many images come before localizers of the same study.
        best = max(
            (one for one in series if (one.patient, one.study) == (series[0].patient, series[0].study)),
            key=lambda one: len(one.stack),
        )
        return Study(series, self.unread, series.index(best))


def _hashes(series: Series) -> tuple[str, ...]:
    """Of the series' files, in order."""
    return tuple(file.sha256 for file in series.stack.files)


def open_stack(stack: Stack) -> Scan:
    """A series of files from ``isolation.read_facts``, set to its middle image.

    An image with a valid header and damaged pixels stays in the series. The viewer shows the error in its place.

    Raises:
        PageError: no image can be decoded.
    """
    scan, first = _first_readable(stack)
    scan.stack, scan.label = stack, stack.group.label
    if any(file.facts.is_burned_in for file in stack.files):
        scan.facts["burned_in_annotation"] = "YES"
    scan.frame = 0 if stack.is_multi_frame else (len(stack) - 1) // 2
    try:
        scan.rendered()
    except PageError:
        scan.frame = first
    return scan


def _first_readable(stack: Stack) -> tuple[Scan, int]:
    """The first image that can be decoded, and its index."""
    problem = PageError("bad_dicom")
    for index, file in enumerate(stack.files):
        try:
            return open_scan(file.data), index
        except PageError as error:
            problem = error
    raise problem


def _number_studies(facts: list[SliceFacts]) -> dict[tuple[str, str], tuple[int, int, int | None]]:
    """(patient, study) -> (number of the patient, number of the study, days before the newest study)."""
    days: dict[tuple[str, str], int | None] = {}
    for one in facts:
        key = (one.patient, one.study)
        days[key] = max((day for day in (days.get(key), one.day) if day is not None), default=None)
    numbers: dict[tuple[str, str], tuple[int, int, int | None]] = {}
    for patient_number, patient in enumerate(dict.fromkeys(patient for patient, _ in days), start=1):
        keys = [key for key in days if key[0] == patient]
        keys.sort(key=lambda key: -(days[key] or 0))
        newest = days[keys[0]]
        for number, key in enumerate(keys, start=1):
            day = days[key]
            before = newest - day if newest is not None and day is not None else None
            numbers[key] = (patient_number, number, before)
    return numbers
