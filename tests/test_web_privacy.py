"""Burned-in text and the PACS in the web UI: what is hidden from the model, and what the picker shows."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from helpers.orthanc import CREDENTIALS, Orthanc, has_orthanc, needs_orthanc
from helpers.serving import stop_all, wait_until
from helpers.web_ui import (
    PATIENT,
    START_S,
    TIMEOUT_MS,
    Parts,
    ScriptedServer,
    ask,
    box_of,
    browser,
    choose_model,
    enter,
    expect,
    load,
    needs_chromium,
    patient_dicom,
    scripted,
    shown,
    tab,
    wait_for_answer,
)
from PIL import Image, ImageDraw, ImageFont
from pydicom.examples import get_path

from babydoctor.imaging.burned_in import is_available
from babydoctor.imaging.load import load_image

pytestmark = [needs_chromium, pytest.mark.slow]
needs_ocr = pytest.mark.skipif(not is_available(), reason="the extra ocr is not installed")
needs_pacs = pytest.mark.skipif(
    importlib.util.find_spec("dicomweb_client") is None or importlib.util.find_spec("highdicom") is None,
    reason="the extra pacs is not installed",
)

NAME, SIDE = (6, 6, 120, 26), (8, 150, 24, 172)
"""Positions of the name and the side mark: left, top, right, bottom."""


class PacsParts(Parts):
    """The web UI with an Orthanc, if one is installed."""

    def __init__(self, folder: Path) -> None:
        self.orthanc = Orthanc(folder / "orthanc") if has_orthanc() and not needs_pacs.args[0] else None
        settings: tuple[str, ...] = ()
        if self.orthanc:
            url = self.orthanc.dicomweb_url
            settings = (f"page.dicomweb=[{{name: Test PACS, url: '{url}', write_back: true}}]",)
        super().__init__(folder, settings, {"BABYDOCTOR_DICOMWEB_TEST_PACS": CREDENTIALS})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PacsParts]:
    running = PacsParts(tmp_path_factory.mktemp("page"))
    yield running
    stop_all([running.page, running.controller, running.worker])
    if running.orthanc:
        running.orthanc.close()


def named_picture() -> bytes:
    """pydicom's MR of the abdomen with a name in a corner and a side mark, as PNG."""
    image = load_image(get_path("overlay"))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    draw.text(NAME[:2], "Doe, Jane", font=font, fill="white")
    draw.text(SIDE[:2], "R", font=font, fill="white")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def brightest(image: Image.Image, place: tuple[int, int, int, int]) -> int:
    return int(np.asarray(image.convert("L").crop(place)).max())


def from_data_url(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def sent(scripted: ScriptedServer) -> Image.Image:
    """The image of the last request that reached the model."""
    parts = scripted.last_request["messages"][-1]["content"]
    return from_data_url(next(part["image_url"]["url"] for part in parts if part["type"] == "image_url"))


@needs_ocr
def test_a_name_is_hidden_from_the_model_until_the_user_shows_it(tab, parts: Parts, scripted: ScriptedServer):
    scripted.say("An answer.")
    enter(tab)
    choose_model(tab, "scripted")
    load(tab, named_picture())
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    # Ask at once, whether or not the search has ended.
    ask(tab, "What is this?")
    wait_for_answer(tab)
    assert brightest(sent(scripted), NAME) < 60
    assert brightest(sent(scripted), SIDE) > 200

    panel = tab.locator("#bd-text-boxes")
    expect(panel).to_contain_text("1 of 1 text that may identify a person is hidden")
    assert brightest(from_data_url(shown(tab)), NAME) < 60
    expect(tab.locator("#bd-viewer svg rect.hidden")).to_have_count(1)
    panel.locator("summary").click()
    # The picture is large enough to see the box.
    assert box_of(tab.locator("#bd-viewer svg rect.hidden"))["width"] > 40
    panel.get_by_role("button", name="Show 1: may be a name").click()
    expect(panel.get_by_role("button", name="Hide 1: may be a name")).to_be_visible()
    expect(tab.locator("#bd-viewer svg rect.shown")).to_have_count(1)
    assert brightest(from_data_url(shown(tab)), NAME) > 200
    tab.get_by_role("button", name="Regenerate").click()
    wait_until(lambda: scripted.num_requests == 2, START_S, "the second request")
    wait_for_answer(tab)
    assert brightest(sent(scripted), NAME) > 200
    panel.get_by_role("button", name="Hide 1 other text").click()
    expect(panel.get_by_role("button", name="Show 1 other text")).to_be_visible()
    assert brightest(from_data_url(shown(tab)), SIDE) < 100
    assert "Doe, Jane" not in tab.content()


@needs_ocr
def test_a_clean_picture_is_reported_and_a_loop_searched_frame_by_frame(tab, parts: Parts):
    enter(tab)
    tab.get_by_role("button", name="Real MR, abdomen").click()
    expect(tab.locator("#bd-text-boxes")).to_contain_text("No text that may identify a person was found")
    tab.get_by_role("button", name="Real echo").click()
    expect(tab.locator("#bd-text-boxes summary")).to_be_visible()
    frame = tab.get_by_role("spinbutton", name="Frame")
    frame.fill("7")
    frame.press("Enter")
    expect(tab.locator("#bd-viewer")).to_contain_text("frame 7 of 30")
    expect(tab.locator("#bd-text-boxes summary")).to_be_visible()


@needs_orthanc
@needs_pacs
def test_an_image_comes_from_the_pacs_and_its_answer_is_stored_there(tab, parts: PacsParts, scripted: ScriptedServer):
    for number in (1, 2, 3):
        parts.orthanc.add(patient_dicom(PatientID="P-4711", SOPInstanceUID=f"1.2.3.{number}", InstanceNumber=number))
    scripted.say("A vertebra.")
    enter(tab)
    choose_model(tab, "scripted")
    tab.get_by_role("button", name="Load from a PACS").click()
    tab.get_by_role("button", name="Search", exact=True).click()
    expect(tab.locator("#bd-pacs-status")).to_contain_text("Please enter a patient ID")
    tab.get_by_label("Patient ID").fill("P-4711")
    tab.get_by_label("Patient ID").press("Enter")
    results = tab.locator("#bd-pacs-results")
    expect(results.locator("li")).to_have_count(1)
    expect(results).to_contain_text(f"{PATIENT} · P-4711")
    expect(results).to_contain_text("2004-01-19 · CT")
    results.locator("li button").click()
    expect(results).to_contain_text("3 images")
    results.get_by_role("button", name="CT series").click()
    expect(tab.locator("#bd-viewer img")).to_be_visible()

    # From now on the tab does not show the patient's name.
    expect(results.locator("li")).to_have_count(0)
    assert PATIENT not in tab.content() and "P-4711" not in tab.content()
    expect(tab.get_by_label("Patient ID")).to_have_value("")
    expect(tab.locator("#bd-study")).to_contain_text("3 images")
    expect(tab.locator("#bd-viewer")).to_contain_text("image 2 of 3")
    tab.locator("#bd-canvas canvas").focus()
    tab.keyboard.press("End")
    expect(tab.locator("#bd-viewer")).to_contain_text("image 3 of 3")
    expect(tab.locator("#bd-facts")).to_contain_text("0.661 × 0.661 mm")
    ask(tab, "What is this?")
    assert wait_for_answer(tab) == "A vertebra."
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Export session").click()
    exported = Path(download.value.path()).read_text(encoding="utf-8")
    assert PATIENT not in exported and "P-4711" not in exported

    tab.get_by_role("button", name="Store the last answer").click()
    tab.get_by_role("button", name="Store", exact=True).click()
    expect(tab.locator("#bd-pacs-stored")).to_contain_text("Tick the box")
    assert len(parts.orthanc.files()) == 3
    tab.get_by_label("Store question and answer").check()
    tab.get_by_role("button", name="Store", exact=True).click()
    expect(tab.locator("#bd-pacs-stored")).to_contain_text("Stored in Test PACS as a research report")
    files = [pydicom.dcmread(io.BytesIO(file)) for file in parts.orthanc.files()]
    (report,) = [file for file in files if file.Modality == "SR"]
    texts = [item.TextValue for item in report.ContentSequence if item.ValueType == "TEXT"]
    assert {"What is this?", "A vertebra."} <= set(texts)
    image = report.ContentSequence[-1].ReferencedSOPSequence[0]
    assert image.ReferencedSOPInstanceUID == "1.2.3.3"

    _open_a_prior(tab, parts)

    # An image that is not from the PACS cannot be stored there.
    tab.get_by_role("button", name="Real MR, abdomen").click()
    expect(tab.locator("#bd-facts")).to_contain_text("MR")
    expect(tab.locator("#bd-study .bd-series")).to_have_count(0)
    tab.get_by_label("Store question and answer").check()
    tab.get_by_role("button", name="Store", exact=True).click()
    expect(tab.locator("#bd-pacs-stored")).to_contain_text("did not come from a PACS")
    log = (parts.folder / "page").read_text(encoding="utf-8")
    assert PATIENT not in log and "P-4711" not in log and CREDENTIALS.partition(":")[2] not in log


def _open_a_prior(tab, parts: PacsParts) -> None:
    """The loaded series and the conversation about it stay; the prior is opened beside it."""
    prior = {"StudyInstanceUID": "1.2.9", "SeriesInstanceUID": "1.2.9.1", "StudyDate": "20030119"}
    for number in (1, 2):
        changes = prior | {"PatientID": "P-4711", "InstanceNumber": number, "SOPInstanceUID": f"1.2.9.1.{number}"}
        parts.orthanc.add(patient_dicom(**changes))
    form, results = tab.get_by_role("button", name="Load from a PACS"), tab.locator("#bd-pacs-results")
    if not tab.get_by_label("Patient ID").is_visible():
        form.click()
    tab.get_by_label("Study date").fill("2003-01-19")
    tab.get_by_label("Keep the loaded series").check()
    tab.get_by_role("button", name="Search", exact=True).click()
    expect(results.locator("li")).to_have_count(1)
    results.locator("li button").click()
    results.get_by_role("button", name="CT series").click()
    expect(tab.locator("#bd-study .bd-series")).to_have_count(2)
    expect(tab.locator("#bd-second-canvas .where")).to_contain_text("of 2")
    expect(tab.locator("#bd-study")).to_contain_text("365 days before study 1")
    expect(tab.locator("#bd-viewer")).to_contain_text("image 3 of 3")
    expect(tab.locator("#bd-chat .bd-answer")).to_have_text("A vertebra.")
    assert PATIENT not in tab.content() and "P-4711" not in tab.content()


@needs_ocr
@pytest.mark.skipif("BABYDOCTOR_PAGE_URL" not in os.environ, reason="BABYDOCTOR_PAGE_URL names no page with a model")
def test_screenshot_for_the_readme(browser):
    """``BABYDOCTOR_PAGE_URL=http://127.0.0.1:7860 pytest tests/test_web_privacy.py -k readme`` renews the picture."""
    context = browser.new_context(viewport={"width": 1280, "height": 1500}, color_scheme="light")
    context.set_default_timeout(TIMEOUT_MS)
    tab = context.new_page()
    tab.goto(os.environ["BABYDOCTOR_PAGE_URL"])
    enter(tab)
    tab.get_by_role("button", name="Real ultrasound, Doppler").click()
    tab.locator("#bd-text-boxes summary").click()
    tab.get_by_role("button", name="Show 5").click()
    expect(tab.locator("#bd-viewer svg rect.shown")).to_have_count(1)
    viewer, facts = (box_of(tab.locator(name)) for name in ("#bd-viewer", "#bd-facts"))
    height = facts["y"] - viewer["y"]
    clip = {"x": viewer["x"] - 8, "y": viewer["y"] - 8, "width": viewer["width"] + 16, "height": height}
    tab.screenshot(path=Path(__file__).parents[1] / "images" / "page_burned_in_text.png", clip=clip)
    context.close()
