"""Search, fetch and store with a real PACS: Orthanc on loopback."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from helpers.orthanc import CREDENTIALS, Orthanc, needs_orthanc
from pydicom.examples import get_path

from babydoctor.imaging.limits import ImageError
from babydoctor.serve.page.pacs.client import PacsClient, PacsInstance, PacsSeries, PacsStudy, StudyQuery, first_part
from babydoctor.serve.page.scan import open_scan
from babydoctor.serve.page.study.pacs_files import PacsFiles
from babydoctor.serve.page.study.uploads import StudyUploads
from babydoctor.serve.page.texts import SENTENCES, PageError
from babydoctor.serve.settings import DicomWebServer, load_settings

pytest.importorskip("dicomweb_client", reason="the extra pacs is not installed")

PATIENT = "Zzyzx^Quentin"


def ct(instance: int = 1, **changes: Any) -> bytes:
    """pydicom's CT with a patient's name and another instance number and UID."""
    dataset = pydicom.dcmread(get_path("ct"))
    dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = PATIENT, "P-4711", "A-42"
    dataset.InstanceNumber = instance
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{instance}"
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def client(url: str, credentials: str | None = CREDENTIALS, **settings: Any) -> PacsClient:
    server = DicomWebServer(name="Test PACS", url=url, **settings)
    return PacsClient(server, {server.credentials_variable: credentials} if credentials else {})


def code(call: Any) -> str:
    with pytest.raises(PageError) as caught:
        call()
    assert caught.value.code in SENTENCES
    return caught.value.code


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    server = Orthanc(tmp_path_factory.mktemp("orthanc"))
    for instance in (10, 2, 1):
        server.add(ct(instance))
    yield server
    server.close()


@needs_orthanc
@pytest.mark.parametrize(
    "query",
    [
        StudyQuery(patient_id="P-4711"),
        StudyQuery(accession=" A-42 "),
        StudyQuery(date="2004-01-19"),
        StudyQuery(date="2004-01-01 to 20041231", patient_id="P-4711"),
    ],
)
def test_search_finds_the_study(orthanc: Orthanc, query: StudyQuery) -> None:
    (study,) = client(orthanc.dicomweb_url).search(query)
    assert (study.date, study.modalities, study.patient) == ("2004-01-19", "CT", f"{PATIENT} · P-4711")
    assert PATIENT not in repr(study) and "P-4711" not in repr(query)


@needs_orthanc
def test_a_series_is_fetched_in_order_and_unchanged(orthanc: Orthanc) -> None:
    pacs = client(orthanc.dicomweb_url + "/")
    (study,) = pacs.search(StudyQuery(patient_id="P-4711"))
    (series,) = [one for one in pacs.series(study) if one.modality == "CT"]
    instances = pacs.instances(series)
    assert series.num_instances == 3
    assert [instance.uid for instance in instances] == ["1.2.3.4.1", "1.2.3.4.2", "1.2.3.4.10"]
    scan, own = open_scan(pacs.fetch(instances[1])), open_scan(ct(2))
    assert np.array_equal(np.asarray(scan.rendered()[0]), np.asarray(own.rendered()[0]))


@needs_orthanc
def test_a_series_becomes_a_study_as_files_do(orthanc: Orthanc) -> None:
    pacs = client(orthanc.dicomweb_url)
    (study,) = pacs.search(StudyQuery(patient_id="P-4711"))
    (series,) = [one for one in pacs.series(study) if one.modality == "CT"]
    instances = pacs.instances(series)
    uploads = StudyUploads()
    ticket = uploads.sources.put(PacsFiles(pacs, instances, len(instances) + 1))

    async def lines() -> list[dict[str, Any]]:
        return [json.loads(line) async for line in uploads.read(uploads.sources.take(ticket))]

    found = asyncio.run(lines())
    loaded = uploads.studies.take(found[-1]["study"])
    assert found[0]["of"] == 4 and loaded.unread == {"not_fetched": 1} and loaded.origin is pacs
    assert [one.size for one in loaded.series] == ["3 images"] and not loaded.extends_loaded
    kept = [ct(1, StudyInstanceUID="1.2.9", SeriesInstanceUID="1.2.9.1", SOPInstanceUID="1.2.9.1.1")]
    ticket = uploads.sources.put(PacsFiles(pacs, instances, len(instances), kept))
    found = asyncio.run(lines())
    loaded = uploads.studies.take(found[-1]["study"])
    assert found[0]["of"] == 4 and loaded.extends_loaded
    assert sorted(one.size for one in loaded.series) == ["1 image", "3 images"]


@needs_orthanc
def test_no_other_study_is_found(orthanc: Orthanc) -> None:
    assert client(orthanc.dicomweb_url).search(StudyQuery(patient_id="P-47")) == []


@needs_orthanc
def test_refusals_of_the_server_are_reported(orthanc: Orthanc) -> None:
    query = StudyQuery(patient_id="P-4711")
    assert code(lambda: client(orthanc.dicomweb_url, None).search(query)) == "pacs_credentials"
    assert code(lambda: client(orthanc.dicomweb_url, "wrong:password").search(query)) == "pacs_credentials"
    assert code(lambda: client(orthanc.url + "/nowhere").search(query)) == "pacs_refused"
    assert code(lambda: client(orthanc.url + "/app/explorer.html").search(query)) in (
        "pacs_refused",
        "pacs_not_dicomweb",
    )
    missing = PacsInstance("1.2", "1.2", "1.2")
    assert code(lambda: client(orthanc.dicomweb_url).fetch(missing)) == "pacs_refused"


def test_missing_and_silent_servers_are_reported() -> None:
    query = StudyQuery(patient_id="P")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/dicom-web"
        assert code(lambda: client(url).search(query)) == "pacs_unreachable"
        silent.listen()
        assert code(lambda: client(url, timeout_s=0.2).search(query)) == "pacs_unreachable"


def test_a_file_over_the_limit_is_not_read_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babydoctor.serve.page.pacs.client.MAX_UPLOAD_BYTES", 10_000)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom\r\n\r\n")
                try:
                    while True:
                        connection.sendall(bytes(65536))
                except OSError:
                    return

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        pacs = client(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert code(lambda: pacs.fetch(PacsInstance("1.2", "1.2", "1.2"))) == "upload_too_large"
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (StudyQuery(), "pacs_no_query"),
        (StudyQuery(patient_id="*"), "pacs_wildcard"),
        (StudyQuery(date="31.5.2024"), "pacs_date"),
        (StudyQuery(date="2024-02-31"), "pacs_date"),
        (StudyQuery(date="2024-01-01 to 2024-01-02 to 2024-01-03"), "pacs_date"),
    ],
)
def test_invalid_queries_are_not_sent(query: StudyQuery, expected: str) -> None:
    assert code(query.filters) == expected


def test_multipart() -> None:
    message = b"--b1\r\nContent-Type: application/dicom\r\n\r\n\r\nab--b\r\n--b1--\r\n"
    assert first_part(message, 'multipart/related; type="application/dicom"; boundary="b1"') == b"\r\nab--b"
    assert first_part(b"x", "application/dicom") == b"x"
    assert code(lambda: first_part(b"--b1\r\nno end", "multipart/related; boundary=b1")) == "pacs_not_dicomweb"


def test_settings_and_their_credentials() -> None:
    settings = load_settings(None, ["page.dicomweb=[{name: Main PACS 2, url: 'https://pacs.example/dicom-web'}]"])
    (server,) = settings.page.dicomweb
    assert server.credentials_variable == "BABYDOCTOR_DICOMWEB_MAIN_PACS_2"
    assert not server.write_back
    pacs = PacsClient(server, {server.credentials_variable: "a-bearer-token"})
    assert pacs._session().headers["Authorization"] == "Bearer a-bearer-token"
    assert "token" not in repr(pacs)


@needs_orthanc
@pytest.mark.parametrize("name", ["ct", "ybr_color"])
def test_a_report_is_stored_and_valid(orthanc: Orthanc, tmp_path: Path, name: str) -> None:
    pytest.importorskip("highdicom", reason="the extra pacs is not installed")
    from babydoctor.serve.page.pacs.report import build_report

    source = pydicom.dcmread(get_path(name))
    source.PatientID = source.PatientID or "P-1"
    report = build_report(
        source, question="Was ist das?", answer="A nodule – 30 mm.", model="tiny", view="frame 3", frame=2
    )
    client(orthanc.dicomweb_url, write_back=True).store(report)
    stored = next(
        file for file in orthanc.files() if pydicom.dcmread(io.BytesIO(file)).SOPInstanceUID == report.SOPInstanceUID
    )
    read = pydicom.dcmread(io.BytesIO(stored))
    assert (read.StudyInstanceUID, read.PatientID) == (source.StudyInstanceUID, source.PatientID)
    assert (read.CompletionFlag, read.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
    assert "NOT FOR CLINICAL USE" in read.SeriesDescription
    image = read.ContentSequence[-1].ReferencedSOPSequence[0]
    assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert image.get("ReferencedFrameNumber") == (3 if name == "ybr_color" else None)

    path = tmp_path / "report.dcm"
    path.write_bytes(stored)
    if shutil.which("dsrdump"):
        shown = subprocess.run(["dsrdump", "+U8", "+Pl", str(path)], capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        for text in ("NOT FOR CLINICAL USE", "Was ist das?", "A nodule – 30 mm.", "frame 3"):
            assert text in shown.stdout
    if shutil.which("dciodvfy"):
        checked = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60)
        assert not [line for line in checked.stderr.splitlines() if line.startswith("Error")], checked.stderr


def test_records_do_not_show_patients() -> None:
    shown = repr(PacsStudy("1.2", "20240531", "CT", PATIENT, "of Quentin")) + repr(
        PacsSeries("1", "1", "CT", "1", 1, PATIENT)
    )
    assert "Quentin" not in shown


def test_a_report_keeps_a_name_in_another_script_and_names_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="the extra pacs is not installed")
    from babydoctor.serve.page.pacs.report import build_report

    path = tmp_path / "source.dcm"
    path.write_bytes(ct(SpecificCharacterSet="GB18030", PatientName="山田^太郎"))
    source = pydicom.dcmread(path)
    report = build_report(source, question="?", answer="é", model="tiny", view="as stored")
    report.save_as(path, enforce_file_format=True)
    assert pydicom.dcmread(path).PatientName == "山田^太郎"
    del source.StudyInstanceUID
    with pytest.raises(ImageError, match="StudyInstanceUID"):
        build_report(source, question="?", answer="e", model="tiny", view="as stored")
