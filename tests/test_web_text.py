"""Burned-in text in the web UI: found, hidden from the model by default, shown again by the user."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from helpers.serving import wait_until
from helpers.web_ui import (
    START_S,
    Parts,
    ScriptedServer,
    ask,
    browser,
    choose_model,
    enter,
    expect,
    load,
    needs_chromium,
    parts,
    scripted,
    shown,
    tab,
    wait_for_answer,
)
from PIL import Image, ImageDraw, ImageFont
from pydicom.examples import get_path

from babydoctor.imaging.burned_in import is_available
from babydoctor.imaging.load import load_image

pytestmark = [
    needs_chromium,
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason="the extra ocr is not installed"),
]

NAME, SIDE = (6, 6, 120, 26), (8, 150, 24, 172)
"""Where the name and the side mark stand: left, top, right, bottom."""


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


def test_a_name_is_hidden_from_the_model_until_the_user_shows_it(tab, parts: Parts, scripted: ScriptedServer):
    scripted.say("An answer.")
    enter(tab)
    choose_model(tab, "scripted")
    load(tab, named_picture())
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    # The question is asked at once, whether or not the search has ended.
    ask(tab, "What is this?")
    wait_for_answer(tab)
    assert brightest(sent(scripted), NAME) < 60
    assert brightest(sent(scripted), SIDE) > 200

    panel = tab.locator("#bd-text-boxes")
    expect(panel).to_contain_text("1 of 1 texts that may identify a person is hidden")
    assert brightest(from_data_url(shown(tab)), NAME) < 60
    expect(tab.locator("#bd-viewer svg rect.hidden")).to_have_count(1)
    panel.locator("summary").click()
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
    assert "Doe" not in tab.content()


def test_a_clean_picture_says_so_and_a_loop_is_searched_frame_by_frame(tab, parts: Parts):
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
