"""The facts about one file that grouping and sorting need. Identifiers become hashes; free text is not read."""

from __future__ import annotations

import datetime
import hashlib
import io
import math
from dataclasses import asdict, dataclass
from typing import Any

from babydoctor.imaging.dicom.file import is_dicom
from babydoctor.imaging.dicom.image import DicomImage
from babydoctor.imaging.dicom.safety import reading_values
from babydoctor.imaging.dicom.values import integer, items, numbers, pixel_spacing, places, text
from babydoctor.imaging.limits import MAX_PIXELS, ImageError
from babydoctor.imaging.load import read_header
from babydoctor.imaging.series.labels import BODY_PARTS, MODALITIES

DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
MAX_LISTED = 20_000
"""Entries of a DICOMDIR that are read."""

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class SliceFacts:
    """Facts about one file.

    Attributes:
        kind: ``dicom``, ``picture``, or ``directory`` for a DICOMDIR.
        patient, study, series, instance, space: SHA-256 of the identifier, empty if the file has none. ``space`` is
            the frame of reference: positions of one space can be compared.
        day: the study date as a proleptic ordinal, to tell older studies from newer ones. It is not shown.
        number: InstanceNumber.
        echo: EchoNumbers.
        rows_direction, columns_direction: ImageOrientationPatient, unit vectors in patient coordinates; None if the
            file does not state a usable one.
        centers: middle of each frame in patient coordinates, in mm; empty if a frame lacks its position.
        listed: instances that a DICOMDIR lists.
    """

    kind: str
    rows: int = 0
    columns: int = 0
    frames: int = 1
    modality: str = ""
    body_part: str = ""
    is_gray: bool = False
    is_burned_in: bool = False
    patient: str = ""
    study: str = ""
    series: str = ""
    instance: str = ""
    space: str = ""
    day: int | None = None
    number: int | None = None
    echo: int | None = None
    rows_direction: Vector | None = None
    columns_direction: Vector | None = None
    centers: tuple[Vector, ...] = ()
    listed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SliceFacts:
        """The inverse of ``to_json`` after a round trip through JSON, which turns tuples into lists."""
        vectors = {
            name: tuple(values[name]) if values[name] is not None else None
            for name in ("rows_direction", "columns_direction")
        }
        centers = tuple(tuple(center) for center in values["centers"])
        return cls(**values | vectors | {"centers": centers, "listed": tuple(values["listed"])})


def hash_of(identifier: str | bytes) -> str:
    """SHA-256 of an identifier or of a file's content; empty for an empty one."""
    data = identifier.encode() if isinstance(identifier, str) else identifier
    return hashlib.sha256(data).hexdigest() if data else ""


def read_facts(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> SliceFacts:
    """Read the facts of a file.

    Raises:
        ImageError: it is neither an image nor a DICOMDIR, is damaged, or is of an unsupported kind.
    """
    try:
        header = read_header(data, name, max_pixels)
    except ImageError as error:
        if error.code == "dicom_without_image" and (directory := _read_directory(data, name)):
            return directory
        raise
    if not isinstance(header.content, DicomImage):
        return SliceFacts("picture", header.height, header.width)
    with reading_values(name):
        return _of_dicom(header.content)


def _of_dicom(dicom: DicomImage) -> SliceFacts:
    dataset = dicom.dataset
    directions = _directions(dataset)
    body_part = text(dataset, "BodyPartExamined").upper()
    return SliceFacts(
        kind="dicom",
        rows=dicom.rows,
        columns=dicom.columns,
        frames=dicom.num_frames,
        modality=dicom.modality if dicom.modality in MODALITIES else "",
        body_part=body_part if body_part in BODY_PARTS else "",
        is_gray=dicom.is_gray,
        is_burned_in=text(dataset, "BurnedInAnnotation") == "YES",
        patient=hash_of(text(dataset, "PatientID")),
        study=hash_of(text(dataset, "StudyInstanceUID")),
        series=hash_of(text(dataset, "SeriesInstanceUID")),
        instance=hash_of(text(dataset, "SOPInstanceUID")),
        space=hash_of(text(dataset, "FrameOfReferenceUID")),
        day=_day(text(dataset, "StudyDate")),
        number=integer(dataset, "InstanceNumber"),
        echo=integer(dataset, "EchoNumbers"),
        rows_direction=directions[0] if directions else None,
        columns_direction=directions[1] if directions else None,
        centers=_centers(dicom) if directions else (),
    )


def _directions(dataset: Any, frame: int = 0) -> tuple[Vector, Vector] | None:
    """Unit vectors along the rows and the columns of a frame; None unless perpendicular (PS3.3 C.7.6.2.1.1)."""
    for item in places(dataset, frame, "PlaneOrientationSequence"):
        cosines = numbers(item, "ImageOrientationPatient")
        if len(cosines) == 6 and all(math.isfinite(value) for value in cosines):
            row, column = cosines[:3], cosines[3:]
            lengths = math.hypot(*row), math.hypot(*column)
            slant = abs(sum(a * b for a, b in zip(row, column, strict=True)))
            if min(lengths) > 0.5 and slant < 0.05 * lengths[0] * lengths[1]:
                return _unit(row), _unit(column)
            return None
    return None


def _unit(vector: list[float]) -> Vector:
    length = math.hypot(*vector)
    x, y, z = (value / length for value in vector)
    return x, y, z


def _centers(dicom: DicomImage) -> tuple[Vector, ...]:
    dataset = dicom.dataset
    centers = []
    for frame in range(dicom.num_frames):
        directions = _directions(dataset, frame)
        position = next(
            (
                found
                for item in places(dataset, frame, "PlanePositionSequence")
                if len(found := numbers(item, "ImagePositionPatient")) == 3 and all(map(math.isfinite, found))
            ),
            None,
        )
        if position is None or directions is None:
            return ()
        row, column = directions
        vertical, horizontal = pixel_spacing(dataset, frame) or (0.0, 0.0)
        right, down = horizontal * (dicom.columns - 1) / 2, vertical * (dicom.rows - 1) / 2
        x, y, z = (p + right * r + down * c for p, r, c in zip(position, row, column, strict=True))
        centers.append((x, y, z))
    # A multi-frame file without a position for each frame has one position for all of them.
    return tuple(centers) if len(centers) == 1 or len(set(centers)) > 1 else ()


def _day(date: str) -> int | None:
    try:
        return datetime.datetime.strptime(date, "%Y%m%d").toordinal()
    except ValueError:
        return None


def _read_directory(data: bytes, name: str) -> SliceFacts | None:
    """The instances that a DICOMDIR lists; None for another object without an image."""
    import pydicom

    if not is_dicom(data):
        return None
    with reading_values(name):
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        meta = getattr(dataset, "file_meta", None)
        if text(meta, "MediaStorageSOPClassUID") != DICOMDIR_CLASS if meta is not None else True:
            return None
        records = items(dataset, "DirectoryRecordSequence")[:MAX_LISTED]
        uids = [text(record, "ReferencedSOPInstanceUIDInFile") for record in records]
        return SliceFacts("directory", listed=tuple(hash_of(uid) for uid in uids if uid))
