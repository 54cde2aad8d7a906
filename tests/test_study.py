"""Studies: grouping and order of images, files that are refused, and links between two series."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zipfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pydicom.data
import pytest
from helpers.image_files import dicom_bytes, encapsulated
from helpers.serving import png
from helpers.study_files import ct_slice, zipped
from helpers.web_ui import PATIENT
from pydicom.dataset import Dataset

from babydoctor.imaging.series import SliceFacts, group_slices
from babydoctor.serve.page import html
from babydoctor.serve.page.session import Session
from babydoctor.serve.page.study import archive
from babydoctor.serve.page.study.archive import Archive, Refused
from babydoctor.serve.page.study.link import link_stacks
from babydoctor.serve.page.study.reasons import CODES, UNREAD
from babydoctor.serve.page.study.study import Study, StudyReader
from babydoctor.serve.page.study.uploads import StudyUploads
from babydoctor.serve.page.texts import SENTENCES, PageError

DICOMDIRS = Path(pydicom.data.__file__).parent / "test_files" / "dicomdirtests"


def read(files: Iterable[bytes | Refused]) -> Study:
    reader = StudyReader()
    for file in files:
        reader.add(file)
    return reader.study()


def places(study: Study, series: int = 0) -> list[float]:
    return [round(center[2]) for center in study.series[series].stack.group.centers]


def test_images_are_sorted_by_position_and_show_what_each_file_holds() -> None:
    study = read(ct_slice(place) for place in (3, 0, 1, 2, 9))
    (series,) = study.series
    assert places(study) == [9, 3, 2, 1, 0]  # from head to feet
    assert (series.label, series.size) == ("CT axial, CHEST", "5 images")
    assert series.notes == ["sorted by position", "1 gap: images may be missing"]
    scan = series.scan
    assert scan.frame == 2 and "image 3 of 5" in scan.view().caption
    shown = [scan.stack.dicom(image)[0].dataset.ImagePositionPatient[2] for image in range(5)] if scan.stack else []
    assert shown == [9, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "order", "words"),
    [
        ({"ImagePositionPatient": None}, [1, 2, 3], "sorted by image number, because positions are missing"),
        ({"ImagePositionPatient": None, "InstanceNumber": None}, [3, 1, 2], "in the order of the files"),
    ],
)
def test_without_positions_the_series_says_what_it_is_sorted_by(
    changes: dict[str, Any], order: list[int], words: str
) -> None:
    study = read(ct_slice(place, **changes) for place in (3, 1, 2))
    stack = study.series[0].stack
    assert [int(file.facts.instance != "") and _place(file.data) for file in stack.files] == order
    assert words in study.series[0].notes[0]


def _place(data: bytes) -> int:
    return int(pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID.split(".")[-1]) - 1000


def test_unreadable_files_are_counted_by_reason() -> None:
    cut = ct_slice(5)[:700]
    files = [ct_slice(1), ct_slice(2), ct_slice(1), b"", b"hello", zipped([b"x"]), cut, png(), Refused("encrypted")]
    study = read(files)
    assert sum(study.unread.values()) == 6
    assert study.unread == {
        **{"copy": 1, "empty": 1, "no_image": 1, "nested_archive": 1, "encrypted": 1},
        **{code: 1 for code in study.unread if code in ("damaged", "dicom_without_image")},
    }
    assert [(one.label, one.size) for one in study.series] == [("CT axial, CHEST", "2 images"), ("picture", "1 image")]
    page = html.study(study)
    assert "6 files not shown" in page and "an exact copy of another image" in page
    assert set(CODES.values()) <= set(UNREAD)


def test_no_free_text_and_no_identifier_reaches_the_list() -> None:
    files = [ct_slice(place, BodyPartExamined="ZZYZX QUENTIN", Modality="QUENTIN") for place in (1, 2)]
    study = read([*files, ct_slice(1, "2", StudyInstanceUID="1.4", StudyDate="20030119")])
    page = html.study(study)
    assert study.has_several_studies and "365 days before study 1" in page
    for word in (PATIENT, PATIENT.upper(), "QUENTIN", "Zzyzx", "1.2.3", "2003", "2004"):
        assert word not in page, word


def test_files_that_a_dicomdir_lists_and_that_are_missing_are_counted() -> None:
    folder = [path for path in sorted((DICOMDIRS / "98892001").rglob("*")) if path.is_file()]
    study = read([(DICOMDIRS / "DICOMDIR").read_bytes(), *(path.read_bytes() for path in folder)])
    assert study.unread == {"not_sent": 31 - len(folder)}
    assert {one.label for one in study.series} == {"CT axial", "CT, mixed planes"}
    with pytest.raises(PageError) as caught:
        read([(DICOMDIRS / "DICOMDIR").read_bytes()])
    assert caught.value.code == "directory_alone"


def test_frames_echoes_sizes_and_planes_are_not_mixed() -> None:
    base = {"kind": "dicom", "rows": 4, "columns": 4, "series": "s", "study": "t", "modality": "MR"}
    axial: dict[str, Any] = base | {"rows_direction": (1, 0, 0), "columns_direction": (0, 1, 0)}
    facts = [
        *(SliceFacts(**axial, echo=echo, centers=((0, 0, z),)) for z in (0.0, 1.0) for echo in (1, 2)),
        *(SliceFacts(**axial | {"rows": 8}, centers=((0, 0, z),)) for z in (0.0, 1.0)),
        SliceFacts(**axial, frames=9),
        SliceFacts(**axial, frames=9),
        SliceFacts(**base, number=2, rows_direction=(0, 1, 0), columns_direction=(0, 0, -1)),
        SliceFacts(**base, number=1, rows_direction=(1, 0, 0), columns_direction=(0, 0, -1)),
    ]
    groups = group_slices(facts)
    assert [group.slices for group in groups] == [(2, 0), (3, 1), (5, 4), (6,), (7,), (9, 8)]
    assert groups[0].label == "MR axial, echo 1" and groups[-1].label == "MR, mixed planes"
    assert [group.order for group in groups] == ["position", "position", "position", "file", "file", "planes"]


@pytest.mark.parametrize("scale", ["many", "large", "bomb", "directory", "damaged"])
def test_archives_are_refused_before_they_are_unpacked(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"many": "study_too_many", "large": "study_too_large", "bomb": "zip_bomb"}.get(scale, "zip_damaged")
    data = zipped([b"\0" * 50_000] * 4)
    if scale == "many":
        monkeypatch.setattr(archive, "MAX_FILES", 3)
    if scale == "large":
        monkeypatch.setattr(archive, "MAX_STUDY_BYTES", 199_999)
    if scale == "bomb":
        monkeypatch.setattr(archive, "SMALL_BYTES", 1000)
    if scale == "directory":
        code, end = "study_too_many", data.rfind(b"PK\x05\x06")
        data = data[: end + 10] + b"\xff\xff" + data[end + 12 :]
    if scale == "damaged":
        data = data[:-30]

    def no_reading(*args: Any) -> bytes:
        raise AssertionError("something was unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "read", no_reading)
    with pytest.raises(PageError) as caught:
        Archive(data)
    assert caught.value.code == code and code in SENTENCES


def test_damaged_members_and_other_compressions_are_refused() -> None:
    data = bytearray(zipped([ct_slice(1), ct_slice(2)], zipfile.ZIP_STORED))
    at = data.find(b"DICM", data.find(b"DICM") + 4)
    data[at + 2000] ^= 0xFF  # the second file's checksum no longer holds
    files = list(Archive(bytes(data)).files())
    assert isinstance(files[0], bytes) and isinstance(files[1], Refused) and files[1].code == "damaged"
    packed = zipped([ct_slice(1)], zipfile.ZIP_LZMA)
    assert [file.code for file in Archive(packed).files() if isinstance(file, Refused)] == ["zip_method"]


def upload(body: bytes, chunk: int = 70_001) -> tuple[StudyUploads, list[dict[str, Any]]]:
    """Send a body in chunks; returns the lines of the reply."""
    uploads = StudyUploads()

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(body), chunk):
            yield body[at : at + chunk]

    async def lines() -> list[dict[str, Any]]:
        return [json.loads(line) async for line in uploads.read(await uploads.receive(chunks()))]

    return uploads, asyncio.run(lines())


def framed(files: Iterable[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def test_files_and_an_archive_arrive_as_the_same_study() -> None:
    files = [ct_slice(place) for place in (2, 0, 1)]
    found = []
    for body in (framed(files), zipped(files)):
        uploads, lines = upload(body)
        assert lines[0]["of"] == 3 and lines[0]["read"] >= 1
        token = lines[-1]["study"]
        study = uploads.studies.take(token)
        found.append([file.sha256 for file in study.series[0].stack.files])
        with pytest.raises(PageError, match="study_gone"):
            uploads.studies.take(token)  # once
    assert found[0] == found[1] and len(found[0]) == 3


def test_memory_is_released_after_a_study_is_read() -> None:
    uploads, lines = upload(framed([ct_slice(0)]))
    assert "study" in lines[-1] and uploads._num_arriving == 0


def test_a_body_that_is_cut_off_or_has_no_image_is_refused() -> None:
    with pytest.raises(PageError, match="upload_broken"):
        upload(framed([ct_slice(0)])[:-5])
    assert upload(framed([b"hello"]))[1][-1] == {"error": "study_empty"}


def test_series_are_linked_by_position_distance_or_number() -> None:
    thick = read(ct_slice(place) for place in (0, 4, 8)).series[0].stack
    thin = read(ct_slice(place, "2") for place in range(9)).series[0].stack
    prior = read(ct_slice(place, "3", FrameOfReferenceUID="1.7") for place in (100, 104)).series[0].stack
    bare = read(ct_slice(place, "4", ImagePositionPatient=None) for place in (1, 2)).series[0].stack
    side = read(ct_slice(place, "5", ImageOrientationPatient=[0, 1, 0, 0, 0, -1]) for place in (1, 2)).series[0].stack
    by_position = link_stacks(thick, thin)
    assert by_position.by == "position"
    assert (by_position.first, by_position.second) == ((-8, -4, 0), tuple(range(-8, 1)))
    assert link_stacks(thick, prior).by == "distance"
    assert link_stacks(thick, bare).by == "index"
    assert link_stacks(thick, side).by == "none"


def test_a_session_counts_its_study_once_and_another_image_ends_it() -> None:
    study = read(ct_slice(place) for place in range(3))
    session = Session(has_accepted=True)
    session.load(study.series[0].scan)
    session.study = study
    assert study.num_bytes < session.num_bytes < 3 * study.num_bytes
    assert session.image_name == "Image 1: CT axial, CHEST"
    session.load(study.series[0].scan)
    assert session.study is None


def test_a_prior_is_opened_beside_the_loaded_series() -> None:
    current = [ct_slice(place, "2") for place in range(3)]
    prior = [ct_slice(place, "3", StudyInstanceUID="1.9", StudyDate="20030120") for place in range(4)]
    loaded = read(current)
    loaded.series[0].scan.set_window(50, 300)
    loaded.series[0].scan.frame = 2
    both = read([*current, *prior])
    assert both.keep_shown(loaded)
    shown, second = both.series[both.shown], both.series[both.second or 0]
    assert shown.scan is loaded.series[0].scan and (shown.scan.frame, shown.scan.center) == (2, 50)
    assert second.size == "4 images" and second.days_before == 364
    assert not read(prior).keep_shown(loaded)


def test_an_image_with_damaged_pixels_keeps_its_place() -> None:
    files = [ct_slice(place) for place in range(3)]
    like = pydicom.dcmread(io.BytesIO(ct_slice(3)))
    same = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "ImageOrientationPatient", "ImagePositionPatient")
    stored = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
    attributes = {keyword: like[keyword].value for keyword in (*same, *stored)}
    frame = struct.pack("<16I", 2, 64, 68, *[0] * 13) + b"\x81\x00\x81\x00\x81\x00"  # RLE that ends too early
    study = read([*files, encapsulated([frame], "1.2.840.10008.1.2.5", **attributes)])
    (series,) = study.series
    assert len(series.stack) == 4 and study.unread == {} and series.scan.frame == 1
    series.scan.frame = 0
    with pytest.raises(PageError, match="bad_dicom"):
        series.scan.view()


def test_a_report_is_not_an_image() -> None:
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID, report.Modality = "1.2.840.10008.5.1.4.1.1.88.11", "1.2", "SR"
    study = read([ct_slice(0), dicom_bytes(report)])
    assert study.unread == {"dicom_without_image": 1}
