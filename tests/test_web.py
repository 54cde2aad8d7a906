"""The web UI without a browser: files, error sentences, overlays, feedback, export and access."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from fastapi import FastAPI
from helpers.serving import png
from PIL import Image
from pydicom.examples import get_path
from starlette.testclient import TestClient

from babydoctor.imaging.burned_in import is_available
from babydoctor.imaging.dicom import IDENTIFYING_TAGS
from babydoctor.serve.api.admission import Keys
from babydoctor.serve.api.errors import API_CODES
from babydoctor.serve.api.origins import OriginCheck
from babydoctor.serve.page import html as show
from babydoctor.serve.page.app import PageGuard
from babydoctor.serve.page.examples import build_examples
from babydoctor.serve.page.feedback import build_row, export_session, save_row
from babydoctor.serve.page.overlay import group_words, place_on_image, to_data_url
from babydoctor.serve.page.scan import AUTO_WINDOW, FILE_WINDOW, describe, open_scan
from babydoctor.serve.page.session import KEEP_MIN, AnswerSettings, Exchange, Session, Sessions
from babydoctor.serve.page.texts import NO_LOCALIZATION, SENTENCES, PageError, localization_note
from babydoctor.serve.page.uploads import MAX_WAITING_BYTES, Uploads


def dicom_bytes(**changes: object) -> bytes:
    """pydicom's CT with some attributes changed."""
    import pydicom

    dataset = pydicom.dcmread(get_path("ct"))
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def without_window(**changes: object) -> bytes:
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(**changes)))
    for keyword in ("WindowCenter", "WindowWidth"):
        if keyword in dataset:
            delattr(dataset, keyword)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def pixels(view_png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view_png)).convert("L"), dtype=float)


def answered(answer: str = "A chest radiograph.", question: str = "What is it?") -> Session:
    session = Session(has_accepted=True, scan=open_scan(png()))
    assert session.scan is not None
    session.view = session.scan.view()
    exchange = Exchange(question, "tiny", AnswerSettings(0, 1, 64), session.view, answer=answer, ended="stop")
    session.exchanges.append(exchange)
    return session


def test_the_web_ui_process_does_not_load_torch():
    code = (
        "import sys; from babydoctor.serve.page.app import build_page_app; build_page_app('http://127.0.0.1:1');"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"hello, this is a letter", "not_an_image"),
        (b"%PDF-1.4 report", "not_an_image"),
        (png()[:200], "damaged_image"),
        (dicom_bytes()[:20_000], "bad_dicom"),
        (Path(get_path("rt_plan")).read_bytes(), "dicom_without_image"),
        (dicom_bytes(Rows=60_000, Columns=60_000), "too_many_pixels"),
    ],
)
def test_a_file_that_cannot_be_used_has_its_own_sentence(data: bytes, code: str):
    with pytest.raises(PageError) as error:
        open_scan(data)
    assert error.value.code == code and error.value.sentence == SENTENCES[code]


def test_every_code_has_a_sentence_and_none_is_technical():
    folder = Path(show.__file__).parent
    sources = [path.read_text() for pattern in ("**/*.py", "static/*.js") for path in folder.glob(pattern)]
    own = {code for text in sources for code in re.findall(r"""(?:PageError\(|error: )["'](\w+)["']""", text)}
    assert len(own) > 15 and own <= SENTENCES.keys()
    others = {
        code for code in SENTENCES if not any(f'"{code}"' in text for text in sources if "SENTENCES:" not in text)
    }
    assert others <= set(API_CODES)
    for code in SENTENCES:
        sentence = PageError(code, retry_after_s=7, limit_mb=128).sentence
        assert "{" not in sentence and "Traceback" not in sentence and sentence.endswith((".", "it."))
    assert "7 seconds" in PageError("queue_full", retry_after_s=7).sentence
    assert "could not answer" in PageError("something_new").sentence


def test_the_shown_image_is_sent_and_depends_on_the_window():
    scan = open_scan(dicom_bytes())
    assert "lung" in scan.presets
    first = scan.view()
    scan.preset = "lung"
    lung = scan.view()
    scan.preset, scan.center, scan.width = None, -600.0, 1500.0
    by_hand = scan.view()
    assert np.array_equal(pixels(lung.png), pixels(by_hand.png)) and not np.array_equal(
        pixels(first.png), pixels(lung.png)
    )
    assert re.search("level -600, width 1500", lung.caption)
    at = scan.window_range()
    assert (at.center, at.width) == (-600, 1500) and at.low <= -1024 and at.high >= 3071


def test_monochrome1_is_inverted_and_mentioned():
    normal = open_scan(dicom_bytes())
    inverse = open_scan(dicom_bytes(PhotometricInterpretation="MONOCHROME1"))
    total = pixels(normal.view().png) + pixels(inverse.view().png)
    outside = total[(total < 250) | (total > 260)]
    assert outside.size < 0.05 * total.size
    assert any("MONOCHROME1" in value for _, value in describe(inverse))


def test_frames_and_spacing_are_shown():
    scan = open_scan(Path(get_path("ybr_color")).read_bytes())
    assert scan.num_frames == 30 and not scan.has_window and ("Frames", "30") in describe(scan)
    first = scan.view()
    scan.frame = 15
    assert scan.view().png != first.png and scan.view().caption.startswith("frame 16 of 30")
    assert ("Pixel spacing", "0.661 × 0.661 mm") in describe(open_scan(dicom_bytes()))


def test_identifying_data_do_not_leave_the_scan():
    scan = open_scan(dicom_bytes(PatientName="Zzyzx^Quentin", PatientID="Q-77123", StudyDescription="Zzyzx study"))
    session = answered()
    session.scan, session.view = scan, scan.view()
    session.exchanges[0].view = session.view
    row = build_row(session, session.exchanges[0], verdict="up", errors=[], comment="", with_image=True)
    texts = [
        repr(scan),
        repr(describe(scan)),
        export_session(session),
        json.dumps(row),
        session.view.png.decode("latin1"),
    ]
    for text in texts:
        assert "Zzyzx" not in text and "77123" not in text
    assert scan.num_identifying >= 3 and not {name for name, _ in describe(scan)} & set(IDENTIFYING_TAGS)


def test_a_pictures_own_text_fields_are_dropped():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Title", "Zzyzx^Quentin")
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG", pnginfo=info)
    assert b"Zzyzx" not in open_scan(buffer.getvalue()).view().png


def test_large_pictures_are_scaled_down():
    view = open_scan(png(size=(3200, 1600))).view()
    assert (view.width, view.height) == (1536, 768)


def test_pieces_are_joined_to_words_with_their_mean():
    pieces = [(" Left", 0), (" pleu", 1), ("ral", 2), (" effusion", 3), (".", 3)]
    tokens = [{"text": text, "weights": np.eye(4)[index].tolist()} for text, index in pieces]
    words = group_words(tokens, 2, 2)
    assert [word for word, _ in words] == ["", "Left", "pleural", "effusion."]
    assert words[2][1].tolist() == [[0, 0.5], [0.5, 0]]
    assert np.allclose(words[0][1], [[0.2, 0.2], [0.2, 0.4]])
    assert group_words([], 2, 2) == []


@pytest.mark.parametrize("size", [(400, 200), (201, 400), (97, 96)])
def test_overlays_are_where_the_model_saw_the_image(size: tuple[int, int]):
    width, height = size
    grid = np.zeros((8, 8))
    # The center of the square is the center of the picture in both image modes.
    grid[3:5, 3:5] = 1
    for mode in ("pad", "square"):
        placed = place_on_image(grid, width, height, mode)
        assert abs(placed.shape[1] / placed.shape[0] - width / height) < 0.02
        rows, columns = np.nonzero(placed > 0.5)
        assert abs(rows.mean() / placed.shape[0] - 0.5) < 0.02 and abs(columns.mean() / placed.shape[1] - 0.5) < 0.02
    # With CLIP's crop, the picture outside the central square is never colored.
    if width == 400:
        placed = place_on_image(np.ones((8, 8)), width, height, "square")
        assert placed[:, :100].max() == 0 and placed[:, 200].min() > 0.9
    image = Image.open(io.BytesIO(base64.b64decode(to_data_url(placed).partition(",")[2])))
    assert image.mode == "RGBA" and image.size == placed.shape[::-1]


def test_feedback_is_a_line_without_the_image_unless_chosen(tmp_path: Path):
    session = answered("Ünlücke </script>")
    file = tmp_path / "deep" / "feedback.jsonl"
    exchange = session.exchanges[0]
    kinds = ["wrong_place", "no_such_kind"]
    save_row(file, build_row(session, exchange, verdict="down", errors=kinds, comment=" x ", with_image=False))
    save_row(file, build_row(session, exchange, verdict="up", errors=[], comment="", with_image=True))
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert first["errors"] == ["wrong_place"] and first["comment"] == "x" and "image_png_base64" not in first
    assert base64.b64decode(second["image_png_base64"]) == exchange.view.png
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PageError, match="not_saved"):
        save_row(blocked / "x.jsonl", first)


def test_the_export_is_one_document_that_programs_can_read():
    hostile = "</script><img src=x onerror=alert(1)>"
    page = export_session(answered(hostile, hostile))
    assert hostile not in page and "Research use only" in page and "data:image/png;base64," in page
    block = re.search(r'<script type="application/json" id="session">(.*?)</script>', page, re.S)
    assert block is not None
    data = json.loads(block[1])
    assert data["exchanges"][0]["answer"] == hostile and data["views"][0]["width"] == 80
    with pytest.raises(PageError, match="no_answer"):
        export_session(Session())


def test_the_image_is_in_the_first_turn_and_failed_turns_are_omitted():
    session = answered()
    assert session.view is not None
    session.exchanges.append(Exchange("lost", "tiny", AnswerSettings(0, 1, 64), session.view, ended="error"))
    turns = session.turns("And now?")
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[0].text == "<image>\nWhat is it?" and turns[-1].text == "And now?"


TAB = "0123456789abcdef" * 2


def test_a_session_survives_a_reload_only(monkeypatch: pytest.MonkeyPatch):
    now_s = 1000.0
    monkeypatch.setattr("babydoctor.serve.page.session.time.monotonic", lambda: now_s)
    sessions = Sessions()
    session = sessions.attach("first load", TAB)
    with pytest.raises(PageError, match="session_lost"):
        sessions.accepted("first load")  # the notice has not been accepted
    session.has_accepted = True
    # On a reload, the old page disconnects before or after the new one connects.
    assert sessions.attach("second load", TAB) is session
    sessions.leave("first load")
    assert session.left_at_s is None
    sessions.leave("second load")
    assert session.left_at_s == now_s
    # After a lost connection, the same page continues.
    assert sessions.accepted("second load") is session and session.left_at_s is None
    sessions.leave("second load")
    now_s += KEEP_MIN * 60 - 1
    sessions.delete_old()
    assert len(sessions) == 1
    now_s += 2
    sessions.delete_old()
    with pytest.raises(PageError, match="session_lost"):
        sessions.accepted("second load")
    # A token from another tab does not open this session.
    assert sessions.attach("third load", "x") is not sessions.attach("fourth load", "x")
    for index in range(300):
        sessions.attach(str(index), f"{index:032x}")
    assert len(sessions) == 256


def test_an_answer_stops_if_its_tab_does_not_return(monkeypatch: pytest.MonkeyPatch):
    now_s = 1000.0
    monkeypatch.setattr("babydoctor.serve.page.session.time.monotonic", lambda: now_s)
    sessions = Sessions()
    session = sessions.attach("load", TAB)
    sessions.leave("load")
    assert not session.is_abandoned
    now_s += 61
    assert session.is_abandoned


def test_an_overlay_says_how_often_such_maps_found_the_finding():
    note = localization_note({"num_near": 38, "num_cases": 40})
    assert "in 38 of 40 cases" in note and "Not measured on real images" in note
    for unknown in (None, {}, {"num_near": None, "num_cases": 40}, {"num_near": "many", "num_cases": 40}):
        assert localization_note(unknown) == NO_LOCALIZATION


def test_an_answer_names_its_image_frame_window_and_model():
    session = answered()
    scan = open_scan(Path(get_path("ybr_color")).read_bytes())
    session.load(scan)
    scan.frame, session.view = 15, scan.view()
    session.exchanges.append(
        Exchange(
            "Why?", "tiny", AnswerSettings(0, 1, 64), scan.view(), session.image_name, answer="So.", ended="length"
        )
    )
    page = show.chat(session)
    assert "Image 1: US" in page and "frame 16 of 30" in page and "model tiny" in page
    assert "data:image/jpeg;base64," in page and "Cut off at the length limit" in page and 'data-copy="So."' in page
    assert "Copy" not in show.chat(Session()) and "Load an image" in show.chat(Session())


def test_a_ct_without_a_stored_window_opens_in_the_soft_tissue_window():
    assert open_scan(dicom_bytes()).view().caption.startswith("level")
    scan = open_scan(without_window())
    assert scan.preset == "soft-tissue" and scan.presets[0] == AUTO_WINDOW
    assert re.search("level 40, width 400", scan.view().caption)
    stored = open_scan(dicom_bytes(WindowCenter=50, WindowWidth=350))
    assert stored.preset is None and stored.presets[0] == FILE_WINDOW and "width 350" in stored.view().caption
    assert open_scan(without_window(Modality="MR")).preset is None


@pytest.mark.parametrize("values", [(0, -1), (2e6, 400), (40, 2e6), (float("nan"), 400), (40, float("inf"))])
def test_an_invalid_window_does_not_change_the_image(values: tuple[float, float]):
    scan = open_scan(dicom_bytes())
    before = scan.view().caption
    with pytest.raises(PageError, match="bad_window"):
        scan.set_window(*values)
    assert scan.view().caption == before


def test_a_window_beyond_the_sliders_is_accepted():
    scan = open_scan(dicom_bytes())
    scan.set_window(5000, 9000)
    assert (scan.window_range().high, scan.window_range().widest) == (5000, 9000)
    scan.set_window(0, 0.25)
    assert scan.window_range().width == 0.25
    scan.set_window(0, 0)
    assert 0 < scan.window_range().width < 1e-9


def test_an_upload_can_be_used_once_and_few_are_kept():
    uploads = Uploads()
    tokens = [uploads.put(bytes([index])) for index in range(20)]
    assert uploads.take(tokens[-1]) == bytes([19])
    for gone in (tokens[-1], tokens[0], "guess"):
        with pytest.raises(PageError, match="upload_gone"):
            uploads.take(gone)
    large = bytes(MAX_WAITING_BYTES - 10)
    first, second = uploads.put(large), uploads.put(bytes(20))
    with pytest.raises(PageError, match="upload_gone"):
        uploads.take(first)
    assert len(uploads.take(second)) == 20


def test_examples_are_drawn_locally_and_can_all_be_opened():
    examples = build_examples()
    assert len(examples) == 8 and sum(bool(example.truth) for example in examples) == 4
    for example in examples:
        assert open_scan(example.load()).view().png
    assert show.gallery(examples).count("<button") == 8


@pytest.mark.skipif(not is_available(), reason="the extra ocr is not installed")
def test_a_search_for_text_keeps_a_message_about_a_failed_upload():
    from babydoctor.serve.page.controller_client import ControllerClient
    from babydoctor.serve.page.events import WebUI

    web = WebUI(ControllerClient("http://127.0.0.1:1"), Uploads(), None)
    web.build()
    session = web.sessions.attach("load", TAB)
    session.load(open_scan(png()))
    assert session.scan is not None
    session.view = session.scan.view()
    changes = asyncio.run(web.text.on_view(SimpleNamespace(session_hash="load")))
    assert web.ui.viewer in changes and changes[web.ui.image_status] == gr.skip()


def test_no_request_uses_gradios_queue():
    # Gradio's stream to the browser ends with the connection, and running answers would end with it.
    from babydoctor.serve.page.controller_client import ControllerClient
    from babydoctor.serve.page.events import WebUI

    demo = WebUI(ControllerClient("http://127.0.0.1:1"), Uploads(), None).build()
    events = [each for each in demo.config["dependencies"] if each["backend_fn"]]
    queued = {each["api_name"] for each in events if each["queue"] is not False}
    assert queued <= {"on_unload"}  # a closing tab receives no reply
    assert len(events) > 15


def test_the_guard_asks_for_a_key_and_blocks_other_sites():
    app = FastAPI()

    @app.get("/")
    async def root() -> str:
        return "page"

    app.add_middleware(PageGuard, keys=Keys(["a-key-of-sixteen-x"]), origins=OriginCheck("0.0.0.0"))
    with TestClient(app) as client:
        refused = client.get("/")
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
        assert client.get("/", auth=("me", "wrong")).status_code == 401
        assert client.get("/", headers={"Authorization": "Basic %%%"}).status_code == 401
        let_in = client.get("/", auth=("anybody", "a-key-of-sixteen-x"))
        assert let_in.status_code == 200 and "connect-src 'self'" in let_in.headers["content-security-policy"]
