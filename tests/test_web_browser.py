"""Chromium uses the whole web UI, with a real controller, worker and web UI process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.serving import png, wait_until
from helpers.web_ui import (
    PATIENT,
    TIMEOUT_MS,
    Parts,
    answers,
    ask,
    browser,
    enter,
    expect,
    load,
    load_example,
    needs_chromium,
    parts,
    patient_dicom,
    shorten,
    shown,
    tab,
    visitor,
    wait_for_answer,
    window,
)
from pydicom.examples import get_path

from babydoctor.serve.page.replay.ask import ask_server
from babydoctor.serve.page.replay.images import replay_views
from babydoctor.serve.page.replay.session_file import read_session
from babydoctor.serve.page.texts import SENTENCES

pytestmark = [needs_chromium, pytest.mark.slow]


def test_a_complete_session(tab, parts: Parts):
    # The notice must be accepted before anything can be used.
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
    expect(tab.locator("#bd-facts")).to_contain_text("burned-in text")
    own = shown(tab)
    assert own != plain
    tab.get_by_label("Window", exact=True).click()
    tab.get_by_role("option", name="lung").click()
    expect(tab.locator("#bd-viewer")).to_contain_text(window(-600, 1500))
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

    # "Where it looked" for the whole answer, then for one word.
    tab.get_by_role("button", name="Where it looked").click()
    tab.get_by_role("button", name="Show for the last answer").click()
    over = tab.locator("#bd-overlay img").nth(1)
    expect(over).to_be_visible()
    word = tab.locator("#bd-words button").nth(1)
    word.click()
    expect(over).to_have_attribute("alt", f"Where the model looked: “{word.inner_text()}”")
    expect(word).to_have_attribute("aria-pressed", "true")
    expect(tab.get_by_text("This does not show that the answer is right")).to_be_visible()

    _feedback(tab, parts)
    _export(tab, parts)
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


def _export(tab, parts: Parts) -> None:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Export session").click()
    assert download.value.suggested_filename.startswith("babydoctor-session-")
    page = Path(download.value.path()).read_text()
    assert "Which modality is this?" in page and "Zzyzx" not in page and "data:image/png;base64," in page
    # The same model gives the same answers again.
    session = read_session(Path(download.value.path()))
    views = replay_views(session, None)
    with ThreadPoolExecutor(1) as pool:  # Playwright's event loop runs in this thread
        options = {"model": None, "api_key": None, "tell": lambda num_done: None}
        new = pool.submit(
            lambda: asyncio.run(ask_server(parts.controller.url, session.answers, views, **options))
        ).result()
    assert [view.status for view in views] == ["from_export"], [view.record for view in session.views]
    assert [answer.text for answer in new] == [answer.answer.strip() for answer in session.answers]


def test_errors_are_sentences(tab, parts: Parts):
    enter(tab)
    status = tab.locator("#bd-status")
    beside_image = tab.locator("#bd-image-status")
    ask(tab, "Is there an image?")
    expect(status).to_contain_text(SENTENCES["no_image"])
    load(tab, b"hello, this is a letter")
    expect(beside_image).to_contain_text(SENTENCES["not_an_image"])
    load(tab, patient_dicom()[:20_000])
    expect(beside_image).to_contain_text(SENTENCES["bad_dicom"])
    load(tab, Path(get_path("rt_plan")).read_bytes())
    expect(beside_image).to_contain_text(SENTENCES["dicom_without_image"])
    load_example(tab)
    expect(status).to_be_hidden()
    expect(beside_image).to_be_hidden()

    # After the worker is killed, the question is back in the box, to be asked again.
    tab.get_by_role("button", name="Clear chat").click()
    parts.worker.kill()
    ask(tab, "Are you there?")
    expect(status).to_contain_text("model")
    expect(tab.get_by_label("Question", exact=True)).to_have_value("Are you there?")
    assert "Traceback" not in tab.content()
    parts.restart_worker()
    shorten(tab)
    ask(tab, "Are you there?")
    assert wait_for_answer(tab)


def test_stop_regenerate_clear_and_busy(tab, parts: Parts):
    import requests

    enter(tab)
    tab.get_by_role("button", name="Real CT").click()
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    shorten(tab, 1024)
    ask(tab, "Tell me everything.")
    tab.get_by_role("button", name="Stop", exact=True).click()
    wait_for_answer(tab)
    expect(tab.locator("#bd-chat .bot").last).to_contain_text("Stopped by you.")
    wait_until(lambda: parts.queue_length() == 0, 60, "the worker's rest")
    tab.get_by_role("spinbutton", name="Longest answer").fill("16")
    tab.get_by_role("spinbutton", name="Longest answer").press("Enter")
    tab.get_by_role("button", name="Regenerate").click()
    expect(tab.locator("#bd-chat .bot").last).not_to_contain_text("Stopped by you.")
    wait_for_answer(tab)
    expect(tab.locator("#bd-chat .user")).to_have_count(1)
    tab.get_by_role("button", name="Clear chat").click()
    expect(tab.locator("#bd-chat .user")).to_have_count(0)

    # Other clients with long greedy answers take both slots.
    wait_until(lambda: parts.queue_length() == 0, 60, "the worker's rest")
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


def test_phone_and_keyboard(browser, parts: Parts):
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}
    with visitor(browser, parts, **phone) as tab:
        _use_a_phone(tab)


def _use_a_phone(tab) -> None:
    # Notice, example and question with the keyboard only.
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
    # The same browser does not show the notice again.
    tab.reload()
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_how_sure_it_is(tab):
    """The tiny run knows images of noise only, so it is warned of a CT."""
    enter(tab)
    load_example(tab)
    shorten(tab, 16)
    ask(tab, "What is it?")
    first = wait_for_answer(tab)
    expect(tab.locator("#bd-chat .bd-sure.warning")).to_contain_text("unlike the images that the model was trained on")
    tab.get_by_role("button", name="How sure is it?").click()
    result = tab.locator("#bd-certainty")
    tab.get_by_role("button", name="Ask 5 more times").click()
    expect(result).to_contain_text("more answers, sampled at random")
    tab.get_by_role("button", name="Ask without the image").click()
    expect(result.locator("dt").nth(1)).to_have_text("Without the image")
    expect(result.locator("dd").first).to_have_text(first, use_inner_text=True)
    expect(answers(tab)).to_have_count(1)  # the conversation is as it was
    load(tab, png(3))
    expect(result).to_be_hidden()
    ask(tab, "What is it?")
    wait_for_answer(tab)
    expect(tab.locator("#bd-chat .bd-sure")).to_have_count(0)


IMAGES = Path(__file__).parents[1] / "images"
needs_page = pytest.mark.skipif(
    "BABYDOCTOR_PAGE_URL" not in os.environ, reason="BABYDOCTOR_PAGE_URL names no web UI with a model"
)


@contextlib.contextmanager
def served_page(browser, width: int, scheme: str):
    """A tab on the web UI that BABYDOCTOR_PAGE_URL names."""
    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_MS)
    tab = context.new_page()
    tab.goto(os.environ["BABYDOCTOR_PAGE_URL"])
    enter(tab)
    yield tab
    context.close()


@needs_page
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_screenshots_for_the_readme(browser, scheme: str, width: int):
    """``BABYDOCTOR_PAGE_URL=http://127.0.0.1:7860 pytest tests/test_web_browser.py -k readme`` renews the pictures."""
    with served_page(browser, width, scheme) as tab:
        tab.get_by_role("button", name="Phantom CT, nodule").click()
        expect(tab.locator("#bd-viewer img")).to_be_visible()
        for question in ("What kind of scan is this?", "What is the main finding?"):
            ask(tab, question)
            wait_for_answer(tab)
        tab.get_by_role("button", name="Where it looked").click()
        tab.get_by_role("button", name="Show for the last answer").click()
        expect(tab.locator("#bd-overlay img").nth(1)).to_be_visible()
        tab.wait_for_timeout(500)
        tab.screenshot(path=IMAGES / f"page_{width}_{scheme}.png", full_page=True)


@needs_page
def test_screenshot_of_a_cat_for_the_readme(browser):
    """The photograph is from scikit-image and in the public domain (CC0)."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        pytest.skip("scikit-image, which has the photograph of a cat, is not installed")
    with served_page(browser, 1280, "light") as tab:
        load(tab, (Path(package.submodule_search_locations[0]) / "data" / "chelsea.png").read_bytes())
        expect(tab.locator("#bd-viewer img")).to_be_visible()
        ask(tab, "What is the main finding?")
        wait_for_answer(tab)
        expect(tab.locator("#bd-chat .bd-sure.warning")).to_be_visible()
        tab.screenshot(path=IMAGES / "page_unfamiliar.png")
