"""Secrets and metadata reach only their owners, and tokens from clients are checked."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from helpers.image_files import dicom_bytes, dicom_dataset
from helpers.serving import (
    Server,
    bare_base64,
    generation,
    llava_answer,
    png,
    start_controller,
    stop_all,
    tiny_worker,
    wait_until,
)
from PIL import Image

from babydoctor.imaging.jpeg import without_metadata
from babydoctor.imaging.limits import ImageError
from babydoctor.serve.page.feedback import export_session
from babydoctor.serve.page.scan import describe, open_scan
from babydoctor.serve.page.session import AnswerSettings, Exchange, Session
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.process import Child

SECRET = "the-registration-secret-of-a-test"
STATUS = {"model_names": ["m"], "speed": 1, "queue_length": 0}


@pytest.fixture(scope="module")
def stranger() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that answers like one of LLaVA's own workers and records all headers."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(dict(self.headers))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps(STATUS).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


@pytest.fixture(scope="module")
def controller(stranger: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_controller(
        tmp_path_factory.mktemp("trust") / "log",
        f"controller.trusted_workers=[{stranger[0]}]",
        environment={"BABYDOCTOR_REGISTRATION_SECRET": SECRET},
    )
    try:
        wait_until(lambda: requests.get(f"{server.url}/healthz", timeout=5).ok, 180, "the controller")
        yield server
    finally:
        stop_all([server])


def post(server: Server, path: str, body: dict | None = None, *, secret: bool = False) -> requests.Response:
    headers = {"Authorization": f"Bearer {SECRET}"} if secret else {}
    return requests.post(server.url + path, json=body or {}, headers=headers, timeout=30)


def test_after_a_start_a_model_is_unavailable_and_not_unknown(controller: Server) -> None:
    """Before: 404, which clients do not try again. Runs first: the controller has just started."""
    refused = requests.post(f"{controller.url}/v1/chat/completions", json={"model": "m", "messages": []}, timeout=10)
    assert refused.status_code in (400, 503)
    refused = post(controller, "/worker_generate", generation())
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0


def test_the_secret_is_sent_only_to_workers_that_know_it(
    controller: Server, stranger: tuple[str, list[dict[str, str]]]
) -> None:
    """Before: a worker that registered without the secret got it with the first probe."""
    url, seen = stranger
    body = {"worker_name": url, "check_heart_beat": True}
    assert post(controller, "/register_worker", body).status_code == 200
    post(controller, "/refresh_all_workers")
    post(controller, "/worker_generate", generation() | {"model": "m"})
    post(controller, "/count_token", {"model": "m", "prompt": "x"})
    assert len(seen) >= 4 and not any(SECRET in str(headers) for headers in seen)
    # It may send heartbeats, but only a caller with the secret can take it out of rotation.
    beat = {"worker_name": url, "queue_length": 0}
    assert post(controller, "/receive_heart_beat", beat).status_code == 200
    assert post(controller, "/unregister_worker", beat).status_code == 403
    # A worker that registers with the secret is called with it, and from then on needs it for every call.
    assert post(controller, "/register_worker", body, secret=True).status_code == 200
    assert SECRET in str(seen[-1])
    for path in ("/register_worker", "/receive_heart_beat", "/unregister_worker"):
        assert post(controller, path, body | beat).status_code == 403, path
    assert post(controller, "/unregister_worker", beat, secret=True).status_code == 200


def test_resume_ids_come_from_controllers_only_and_contain_no_control_tokens(controller: Server) -> None:
    """Before: a client could put ``</s><s>[INST]`` into the answer so far."""
    worker = tiny_worker()
    status = requests.post(f"{worker.url}/worker_get_status", timeout=10).json()
    body = {"worker_name": worker.url, "check_heart_beat": False, "worker_status": status}
    assert post(controller, "/register_worker", body, secret=True).status_code == 200
    refused = post(controller, "/worker_generate", generation(resume_ids=[5, 6]))
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "bad_resume_ids"
    assert llava_answer(controller.url, generation(max_new_tokens=4))
    for ids in ([1, 5], [5, 2, 1, 6], [10**6]):
        refused = requests.post(f"{worker.url}/worker_generate", json=generation(resume_ids=ids), timeout=30)
        assert refused.json()["error"]["code"] == "bad_resume_ids", ids


@pytest.mark.parametrize("stop", [["x" * 10] * 33, "y" * 2000])
def test_stop_strings_are_bounded(stop: Any) -> None:
    refused = requests.post(f"{tiny_worker().url}/worker_generate", json=generation(stop=stop), timeout=30)
    assert refused.status_code == 422 and "stop" in refused.json()["error"]["message"]


def test_counting_tokens_uses_a_request_slot() -> None:
    """Before: any number at once. The worker has four slots and a queue of three."""
    prompt = "a b c d " * 8000
    statuses: list[int] = []

    def count() -> None:
        body = {"model": "tiny", "prompt": prompt}
        statuses.append(requests.post(f"{tiny_worker().url}/count_token", json=body, timeout=120).status_code)

    threads = [threading.Thread(target=count) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    wait_until(lambda: requests.post(f"{tiny_worker().url}/worker_get_status").json()["queue_length"] == 0)


# Metadata of pictures for servers behind an upstream worker.


def jpeg(**options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((240, 160))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x010E], data[0x0112] = "DOE^JANE 1970", orientation
    return data.tobytes()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"DOE^JANE"}, {"exif": exif(1)}])
def test_metadata_is_removed_from_a_jpeg_and_the_picture_unchanged(options: dict[str, Any]) -> None:
    data = jpeg(**options) + b"DOE^JANE behind the end"
    clean = without_metadata(data)
    assert clean is not None and b"DOE" not in clean
    before, after = (np.asarray(Image.open(io.BytesIO(each))) for each in (data, clean))
    np.testing.assert_array_equal(before, after)
    assert not Image.open(io.BytesIO(clean)).getexif()


@pytest.mark.parametrize("data", [jpeg(exif=exif(6)), jpeg()[:300], b"\xff\xd8\xff\xe1\x00\x00", b"\xff\xd8", b"GIF8"])
def test_a_rotated_or_damaged_jpeg_is_not_kept(data: bytes) -> None:
    assert without_metadata(data) is None


# Headers of DICOM files.


def _with_text_everywhere(**attributes: Any) -> bytes:
    dataset = dicom_dataset(np.arange(64, dtype=np.uint16).reshape(8, 8), **attributes)
    for keyword in (
        *("PatientName", "PatientID", "StudyDescription", "SeriesDescription", "ImageComments", "InstitutionName"),
        *("ProtocolName", "BodyPartExamined", "ViewPosition", "ImageLaterality", "Modality", "BurnedInAnnotation"),
        *("WindowCenterWidthExplanation", "RescaleType", "PresentationLUTShape", "LossyImageCompressionMethod"),
        *("ManufacturerModelName", "SoftwareVersions", "Laterality", "PatientComments", "VOILUTFunction"),
    ):
        if keyword not in attributes:
            setattr(dataset, keyword, "DOE^JANE")
    dataset.WindowCenter, dataset.WindowWidth = "30", "60"
    return dicom_bytes(dataset)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"PhotometricInterpretation": "DOE^JANE"},
        {"Rows": ("LO", "DOE^JANE")},
        {"BitsStored": ("LO", "DOE^JANE")},
        {"SamplesPerPixel": ("LO", "DOE^JANE")},
        {"NumberOfFrames": ("LO", "DOE^JANE")},
        {"PixelSpacing": ("LO", "DOE^JANE")},
        {"RescaleSlope": ("LO", "DOE^JANE")},
        {"WindowWidth": ("LO", "DOE^JANE")},
        {"PixelPaddingValue": ("LO", "DOE^JANE")},
    ],
)
def test_no_free_text_of_a_header_is_shown(attributes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    from babydoctor.imaging import isolation
    from babydoctor.imaging.load import load_image

    data = _with_text_everywhere(**attributes)
    caplog.clear()  # warnings of pydicom from when the file was written
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for load in (load_image, isolation.load_image):
            try:
                image = load(data, name="scan")
                said.append(str(image.info))
            except ImageError as error:
                said.append(str(error))
        try:
            session = Session(has_accepted=True)
            session.load(open_scan(data))
            assert session.scan is not None
            session.view = session.scan.view()
            exchange = Exchange("what?", "m", AnswerSettings(0, 1, 16), session.view, session.image_name)
            exchange.answer = exchange.ended = "stop"
            session.exchanges.append(exchange)
            said += [str(describe(session.scan)), exchange.source, export_session(session), session.view.caption]
        except PageError as error:
            said.append(error.sentence)
    body = generation(png()) | {"images": [bare_base64(data)]}
    answer = requests.post(f"{tiny_worker().url}/worker_generate", json=body | {"max_new_tokens": 2}, timeout=60)
    said += [answer.text, caplog.text, tiny_worker().log.read_text()]
    for text in said:
        assert "DOE" not in text and "JANE" not in text, text[:2000]


# Parts that die repeatedly.


def test_a_part_that_dies_is_restarted_with_growing_delays_without_limit() -> None:
    """Before: the fifth end of a worker, and the first of the controller, stopped everything."""
    child = Child("x", ["no-such-command"], "", {"PATH": "/usr/bin"})
    child.process.wait(60)
    now_s = time.monotonic()
    delays = [child.plan_restart(now_s) for _ in range(40)]
    assert delays[:4] == [0.5, 1, 2, 4] and delays[-1] == 30
    child.started_s = now_s - 100
    assert child.plan_restart(now_s) == 0.5


# Host and Origin. Before: a web page of any site could reach services on 127.0.0.1, and by DNS rebinding read replies.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Host": "attacker.example"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
    ],
)
def test_web_pages_of_other_sites_cannot_call_a_local_service(
    controller: Server, headers: dict[str, str], status: int
) -> None:
    answer = requests.post(f"{controller.url}/list_models", headers=headers, timeout=10)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "bad_origin"


def test_own_pages_and_allowed_hosts_may_call() -> None:
    from babydoctor.serve.api.errors import ApiError
    from babydoctor.serve.api.origins import OriginCheck

    def check(listens: str = "127.0.0.1", **headers: str) -> None:
        OriginCheck(listens, ("ward.example",), ("https://app.example",)).check(
            [(name.encode(), value.encode()) for name, value in headers.items()]
        )

    check(host="127.0.0.1:7860", origin="http://127.0.0.1:7860")
    check(host="ward.example", origin="https://ward.example")
    check(host="127.0.0.1:1", origin="https://app.example")
    check("0.0.0.0", host="anything.example", origin="https://anything.example")
    with pytest.raises(ApiError):
        check(host="ward.example", origin="https://ward.example.evil")
    with pytest.raises(ApiError):
        check()


def test_the_web_ui_checks_them_too() -> None:
    import asyncio

    import httpx

    from babydoctor.serve.api.admission import Keys
    from babydoctor.serve.api.origins import OriginCheck
    from babydoctor.serve.page.app import PageGuard

    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    async def ask(host: str) -> int:
        guard = PageGuard(hello, keys=Keys(()), origins=OriginCheck("127.0.0.1"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as client:
            return (await client.get(f"http://{host}/")).status_code

    assert asyncio.run(ask("127.0.0.1")) == 200 and asyncio.run(ask("attacker.example")) == 403


# Feedback.


def test_feedback_is_bounded_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from babydoctor.serve.page import feedback

    file = tmp_path / "new" / "feedback.jsonl"
    threads = [
        threading.Thread(target=feedback.save_row, args=(file, {"comment": "x" * 50_000, "row": index}))
        for index in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    assert sorted(row["row"] for row in rows) == list(range(16))
    monkeypatch.setattr(feedback, "MAX_FILE_BYTES", file.stat().st_size + 10)
    size = file.stat().st_size
    with pytest.raises(PageError) as refused:
        feedback.save_row(file, {"comment": "one too many"})
    assert refused.value.code == "feedback_full" and file.stat().st_size == size


def test_a_full_disk_leaves_no_partial_row(tmp_path: Path) -> None:
    from helpers.training import small_disk

    from babydoctor.serve.page import feedback

    with small_disk(tmp_path / "disk", "1m") as disk:
        with pytest.raises(PageError):
            for index in range(100):
                feedback.save_row(disk / "feedback.jsonl", {"row": index, "comment": "x" * 30_000})
        content = (disk / "feedback.jsonl").read_bytes()
    assert content.endswith(b"\n") and all(json.loads(line) for line in content.split(b"\n")[:-1])
