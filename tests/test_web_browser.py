"""Chromium through the whole page, over a real controller, worker and page process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.examples import get_path
from serving import Server, free_port, png, start, start_controller, start_worker, stop_all, tiny_run, wait_ready
from serving import wait_until as wait

from babydoctor.serve.page.texts import SENTENCES

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

CHROMIUM = os.environ.get("BABYDOCTOR_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (set BABYDOCTOR_CHROMIUM)"),
    pytest.mark.slow,
]

FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
]
PATIENT = "Zzyzx^Quentin"
TIMEOUT_MS = 20_000


class Parts:
    """The processes behind the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.feedback = folder / "feedback.jsonl"
        self.controller = start_controller(folder / "controller.log")
        self.worker = self.start_worker()
        port = free_port()
        arguments = ["web", f"page.port={port}", f"page.feedback_file={self.feedback}"]
        self.page = start(
            [*arguments, "--controller", self.controller.url], f"http://127.0.0.1:{port}", folder / "page"
        )
        wait_ready(self.controller)
        wait(self._page_answers, 60, "the page")

    def start_worker(self) -> Server:
        settings = (f"worker.controller={self.controller.url}", "worker.heart_beat_s=1", "limits.max_queue=0")
        return start_worker(tiny_run(), self.folder / "worker.log", *settings, "engine.max_running=2")

    def _page_answers(self) -> bool:
        import requests

        return requests.get(f"{self.page.url}/healthz", timeout=2).status_code == 200


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    running = Parts(tmp_path_factory.mktemp("page"))
    yield running
    stop_all([running.page, running.controller, running.worker])


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, parts: Parts) -> Iterator[object]:
    """A new visitor's tab. Whatever it asks of another server, and whatever goes wrong in it, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    foreign: list[str] = []
    faults: list[str] = []

    def on_request(request) -> None:
        if not request.url.startswith((parts.page.url, "data:", "blob:")):
            foreign.append(request.url)

    page.on("request", on_request)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(parts.page.url)
    yield page
    context.close()
    assert not foreign and not faults, (foreign, faults)


def enter(tab) -> None:
    tab.get_by_label("I have read this").check()
    tab.get_by_role("button", name="Continue").click()
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()


def load(tab, data: bytes) -> None:
    """Load a file whose name would give a person away."""
    tab.locator("#bd-file").set_input_files({"name": f"{PATIENT}.bin", "mimeType": "", "buffer": data})


def shown(tab) -> str:
    return tab.locator("#bd-viewer img").get_attribute("src")


def shorten(tab, num_tokens: int = 32) -> None:
    tab.get_by_role("button", name="Settings").click()
    box = tab.get_by_role("spinbutton", name="Longest answer")
    box.fill(str(num_tokens))
    box.press("Enter")


def ask(tab, question: str) -> None:
    tab.get_by_label("Question", exact=True).fill(question)
    tab.get_by_label("Question", exact=True).press("Enter")


def wait_for_answer(tab) -> str:
    expect(tab.get_by_label("Question", exact=True)).to_have_value("")
    expect(tab.locator("#bd-chat .bot").last).not_to_contain_text("…")
    expect(tab.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()
    return tab.locator("#bd-chat .bot").last.inner_text()


def patient_dicom() -> bytes:
    import io

    import pydicom

    dataset = pydicom.dcmread(get_path("ct"))
    dataset.PatientName = PATIENT
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def test_the_whole_way(tab, parts: Parts):
    # The gate: nothing can be used before it.
    expect(tab.get_by_role("button", name="Continue")).to_be_disabled()
    expect(tab.get_by_role("button", name="Send", exact=True)).to_have_count(0)
    expect(tab.get_by_text("Research use only")).to_be_visible()
    enter(tab)
    expect(tab.get_by_text("Research use only")).to_be_visible()
    expect(tab.get_by_label("Model")).to_have_value("tiny")

    # A picture.
    load(tab, png())
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    expect(tab.locator("#bd-window")).to_be_hidden()
    plain = shown(tab)

    # A DICOM file: facts, warning, no name; preset and sliders change what is shown.
    load(tab, patient_dicom())
    expect(tab.locator("#bd-facts")).to_contain_text("CT")
    expect(tab.locator("#bd-facts")).to_contain_text("0.661 × 0.661 mm")
    expect(tab.locator("#bd-facts")).to_contain_text("burned into the pixels")
    own = shown(tab)
    assert own != plain
    tab.get_by_label("Window", exact=True).click()
    tab.get_by_role("option", name="lung").click()
    expect(tab.locator("#bd-viewer")).to_contain_text("centre -600, width 1500")
    lung = shown(tab)
    assert lung != own
    slider = tab.locator("#bd-width input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    expect(tab.locator("#bd-viewer")).to_contain_text("width 1499")

    # A question; the answer streams.
    shorten(tab)
    ask(tab, "Which modality is this?")
    answer = wait_for_answer(tab)
    assert len(answer) > 10
    ask(tab, "And what else?")
    assert wait_for_answer(tab)
    expect(tab.locator("#bd-chat .user")).to_have_count(2)

    # Where it looked: the whole answer, then one word.
    tab.get_by_role("button", name="Where it looked").click()
    tab.get_by_role("button", name="Show for the last answer").click()
    over = tab.locator("#bd-overlay img").nth(1)
    expect(over).to_be_visible()
    whole = over.get_attribute("src")
    word = tab.locator("#bd-words button").nth(1)
    word.click()
    expect(over).not_to_have_attribute("src", whole)
    expect(word).to_have_attribute("aria-pressed", "true")
    expect(tab.get_by_text("It does not show that the answer is right")).to_be_visible()

    _feedback(tab, parts)
    _export(tab)
    assert PATIENT not in tab.content() and "Zzyzx" not in tab.content()
    logs = "".join(path.read_text() for path in parts.folder.iterdir() if path.is_file())
    assert "Zzyzx" not in logs and "Which modality" not in (parts.folder / "page").read_text()
    assert "Traceback" not in logs


def _feedback(tab, parts: Parts) -> None:
    tab.get_by_role("button", name="Feedback on the last answer").click()
    tab.get_by_label("Bad", exact=True).check()
    tab.get_by_label("Wrong place").check()
    tab.get_by_label("Comment").fill("left, not right")
    tab.get_by_role("button", name="Save feedback").click()
    expect(tab.locator("#bd-saved")).to_contain_text(SENTENCES["no_consent"])
    assert not parts.feedback.exists()
    tab.get_by_label("Save my feedback").check()
    tab.get_by_role("button", name="Save feedback").click()
    expect(tab.locator("#bd-saved")).to_contain_text("Saved without the image")
    row = json.loads(parts.feedback.read_text())
    assert row["errors"] == ["wrong_place"] and row["verdict"] == "down" and row["question"] == "And what else?"
    assert row["comment"] == "left, not right" and "image_png_base64" not in row


def _export(tab) -> None:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Export session").click()
    assert download.value.suggested_filename.startswith("babydoctor-session-")
    page = Path(download.value.path()).read_text()
    assert "Which modality is this?" in page and "Zzyzx" not in page and "data:image/png;base64," in page


def test_errors_are_sentences(tab, parts: Parts):
    enter(tab)
    status = tab.locator("#bd-status")
    ask(tab, "Is there an image?")
    expect(status).to_contain_text(SENTENCES["no_image"])
    load(tab, b"hello, this is a letter")
    expect(status).to_contain_text(SENTENCES["not_an_image"])
    load(tab, patient_dicom()[:20_000])
    expect(status).to_contain_text(SENTENCES["bad_dicom"])
    load(tab, Path(get_path("rt_plan")).read_bytes())
    expect(status).to_contain_text(SENTENCES["dicom_without_image"])
    tab.get_by_role("button", name="Real CT").click()
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    expect(status).to_be_hidden()

    # The worker is killed: the question comes back, to be asked again.
    tab.get_by_role("button", name="Clear chat").click()
    parts.worker.kill()
    ask(tab, "Are you there?")
    expect(status).to_contain_text("model")
    expect(tab.get_by_label("Question", exact=True)).to_have_value("Are you there?")
    assert "Traceback" not in tab.content()
    parts.worker = wait_ready(parts.start_worker())
    wait(lambda: _models(parts) == ["tiny"], 20, "the worker's return")
    shorten(tab)
    ask(tab, "Are you there?")
    assert wait_for_answer(tab)


def _models(parts: Parts) -> list[str]:
    import requests

    return requests.post(f"{parts.controller.url}/list_models", timeout=5).json()["models"]


def test_stop_regenerate_clear_and_busy(tab, parts: Parts):
    import requests

    enter(tab)
    tab.get_by_role("button", name="Real CT").click()
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    shorten(tab, 1024)
    ask(tab, "Tell me everything.")
    tab.get_by_role("button", name="Stop", exact=True).click()
    assert "Stopped by you." in wait_for_answer(tab)
    wait(lambda: _queue(parts) == 0, 10, "the worker's rest")
    tab.get_by_role("spinbutton", name="Longest answer").fill("16")
    tab.get_by_role("spinbutton", name="Longest answer").press("Enter")
    tab.get_by_role("button", name="Regenerate").click()
    expect(tab.locator("#bd-chat .bot").last).not_to_contain_text("Stopped by you.")
    wait_for_answer(tab)
    expect(tab.locator("#bd-chat .user")).to_have_count(1)
    tab.get_by_role("button", name="Clear chat").click()
    expect(tab.locator("#bd-chat .user")).to_have_count(0)

    # Both slots taken by others, whose greedy answers are long.
    wait(lambda: _queue(parts) == 0, 10, "the worker's rest")
    body = {"model": "tiny", "prompt": "x", "max_new_tokens": 1024, "temperature": 0}
    others = [
        requests.post(f"{parts.controller.url}/worker_generate_stream", json=body, stream=True, timeout=10)
        for _ in range(2)
    ]
    assert [other.status_code for other in others] == [200, 200]
    ask(tab, "Me, too?")
    expect(tab.locator("#bd-status")).to_contain_text("busy")
    for other in others:
        other.close()


def _queue(parts: Parts) -> int:
    import requests

    return requests.post(f"{parts.worker.url}/worker_get_status", timeout=5).json()["queue_length"]


def test_phone_and_keyboard(browser, parts: Parts):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    context.set_default_timeout(TIMEOUT_MS)
    tab = context.new_page()
    tab.goto(parts.page.url)
    # By keyboard alone: gate, example, question.
    tab.get_by_label("I have read this").focus()
    tab.keyboard.press("Space")
    expect(tab.get_by_role("button", name="Continue")).to_be_enabled()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()
    tab.locator("#bd-file").focus()
    for _ in range(5):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate("document.body.classList.contains('dark')")
    unnamed = """() => [...document.querySelectorAll('input, textarea, select, button')].filter((item) =>
        item.offsetParent && !item.ariaLabel && !item.labels?.length && !item.textContent.trim() && !item.title
        && !item.getAttribute('aria-labelledby')).map((item) => item.outerHTML.slice(0, 200))"""
    assert tab.evaluate(unnamed) == []
    # The gate is not asked for again by the same browser.
    tab.reload()
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()
    context.close()


@pytest.mark.skipif("BABYDOCTOR_PAGE_URL" not in os.environ, reason="BABYDOCTOR_PAGE_URL names no page with a model")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_screenshots_for_the_readme(browser, scheme: str, width: int):
    """``BABYDOCTOR_PAGE_URL=http://127.0.0.1:7860 pytest tests/test_web_browser.py -k readme`` renews the pictures."""
    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_MS)
    tab = context.new_page()
    tab.goto(os.environ["BABYDOCTOR_PAGE_URL"])
    enter(tab)
    tab.get_by_role("button", name="Phantom CT, nodule").click()
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    for question in ("What kind of scan is this?", "What is the main finding?"):
        ask(tab, question)
        wait_for_answer(tab)
    tab.get_by_role("button", name="Where it looked").click()
    tab.get_by_role("button", name="Show for the last answer").click()
    expect(tab.locator("#bd-overlay img").nth(1)).to_be_visible()
    tab.wait_for_timeout(500)
    folder = Path(__file__).parents[1] / "images"
    tab.screenshot(path=folder / f"page_{width}_{scheme}.png", full_page=True)
    context.close()
