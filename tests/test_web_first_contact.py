"""Chromium and the problems of a first session: typed windows, dead models, failed uploads, lost connections."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import stop_all, wait_until
from helpers.web_ui import (
    START_S,
    Parts,
    ScriptedServer,
    answers,
    ask,
    box_of,
    browser,
    choose_model,
    enter,
    expect,
    load,
    load_example,
    needs_chromium,
    parts,
    patient_dicom,
    question_box,
    scripted,
    shown,
    tab,
    visitor,
    wait_for_answer,
    window,
)
from pydicom.examples import get_path

from babydoctor.serve.page.texts import CONNECTION, SENTENCES, model_back, model_gone

pytestmark = [needs_chromium, pytest.mark.slow]

OFFLINE_MS = 15_000


def scroll_top(tab: Any) -> float:
    return tab.evaluate("document.getElementById('bd-chat').scrollTop")


def below_end(tab: Any) -> float:
    return tab.evaluate(
        "(() => { const b = document.getElementById('bd-chat');"
        " return b.scrollHeight - b.scrollTop - b.clientHeight; })()"
    )


def number(tab: Any, name: str) -> Any:
    return tab.locator(f"#bd-{name} input[type=number]")


def test_a_typed_window_beyond_the_sliders_is_shown(tab: Any):
    enter(tab)
    load(tab, patient_dicom())
    viewer, beside_image = tab.locator("#bd-viewer"), tab.locator("#bd-image-status")
    expect(tab.locator("#bd-facts")).to_contain_text("CT")
    number(tab, "center").fill("5000")
    expect(viewer).to_contain_text("5000")
    number(tab, "center").press("Tab")
    number(tab, "width").fill("9000")
    expect(viewer).to_contain_text(window(5000, 9000))  # before that, Gradio limits the value to the slider's range
    number(tab, "width").press("Tab")
    expect(number(tab, "center")).to_have_value("5000")
    expect(number(tab, "width")).to_have_value("9000")
    # An invalid value is reported, and the boxes show the image's window again.
    number(tab, "width").fill("-5")
    number(tab, "width").press("Tab")
    expect(beside_image).to_contain_text(SENTENCES["bad_window"])
    expect(number(tab, "width")).to_have_value("9000")
    expect(viewer).to_contain_text(window(5000, 9000))
    number(tab, "width").fill("")
    number(tab, "width").press("Tab")
    expect(number(tab, "width")).to_have_value("9000")
    number(tab, "width").fill("350")
    expect(viewer).to_contain_text(window(5000, 350))
    expect(beside_image).to_be_hidden()
    # The other boxes, too.
    load(tab, Path(get_path("ybr_color")).read_bytes())
    expect(viewer).to_contain_text("frame 1 of 30")
    number(tab, "frame").fill("99")
    number(tab, "frame").press("Tab")
    expect(viewer).to_contain_text("frame 30 of 30")
    expect(number(tab, "frame")).to_have_value("30")


def test_a_ct_without_a_stored_window_opens_at_40_400(tab: Any):
    enter(tab)
    load(tab, patient_dicom(without=("WindowCenter", "WindowWidth")))
    expect(tab.locator("#bd-viewer")).to_contain_text(window(40, 400))
    expect(number(tab, "center")).to_have_value("40")
    expect(number(tab, "width")).to_have_value("400")
    expect(tab.get_by_label("Window", exact=True)).to_have_value("soft-tissue")


def test_a_question_right_after_a_drag_gets_what_the_canvas_shows(tab: Any, scripted: ScriptedServer):
    scripted.say("Fine.")
    enter(tab)
    choose_model(tab, "scripted")
    load_example(tab)
    question_box(tab).fill("What is this?")
    canvas = tab.locator("#bd-canvas canvas")
    canvas.scroll_into_view_if_needed()
    box = box_of(canvas)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 37, y + 11, steps=3)
    question_box(tab).press("Enter")  # the button is still down, and the server has not been told yet
    tab.mouse.up()
    assert wait_for_answer(tab) == "Fine."
    shown_window = re.search(r"level (\S+), width (\S+)", tab.locator("#bd-canvas .where").inner_text())
    assert shown_window is not None
    said = f"level {shown_window[1]}, width {shown_window[2]}"
    assert said in tab.locator("#bd-chat .bd-source").inner_text()


def test_settings_typed_beyond_their_sliders_do_not_stop_an_answer(tab: Any, scripted: ScriptedServer):
    scripted.say("Fine.")
    enter(tab)
    choose_model(tab, "scripted")
    load_example(tab)
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_role("spinbutton", name="Temperature").fill("7")
    tab.get_by_role("spinbutton", name="Longest answer").fill("99999")
    ask(tab, "Are you fine?")
    assert wait_for_answer(tab) == "Fine."


def test_continue_does_not_wait_for_the_server_to_know_the_tab(browser: Any, parts: Parts):
    held: list[Any] = []

    def hold_opening(route: Any) -> None:
        """Hold the call that a tab sends when it opens."""
        is_opening = '\\"reloaded\\"' in route.request.post_data and route.request.post_data_json["data"][0] is False
        held.append(route) if is_opening else route.continue_()

    with visitor(browser, parts) as tab:
        tab.route("**/run/predict", hold_opening)
        tab.reload()
        enter(tab)
        load_example(tab)
        question_box(tab).fill("Typed at once")
        assert len(held) == 1
        with tab.expect_response("**/run/predict"):
            held[0].continue_()
        tab.get_by_role("button", name="Settings").click()
        expect(tab.get_by_role("spinbutton", name="Temperature")).to_be_visible()
        expect(question_box(tab)).to_have_value("Typed at once")
        expect(tab.locator("#bd-viewer img")).to_be_visible()
        tab.unroute("**/run/predict")
        tab.reload()  # The session is the same tab's, so it comes back.
        expect(tab.locator("#bd-viewer img")).to_be_visible()
        expect(question_box(tab)).to_have_value("Typed at once")


def test_a_model_that_dies_is_not_silently_replaced(tab: Any, parts: Parts, scripted: ScriptedServer):
    enter(tab)
    choose_model(tab, "tiny")
    load_example(tab)
    before = scripted.num_requests
    parts.worker.kill()
    ask(tab, "Are you there?")
    expect(tab.locator("#bd-model-status")).to_contain_text(model_gone("tiny"))
    expect(tab.get_by_label("Model")).to_have_value("tiny (not running)")
    expect(question_box(tab)).to_have_value("Are you there?")
    expect(tab.locator("#bd-look-panel")).to_be_hidden()
    assert scripted.num_requests == before
    parts.restart_worker()
    expect(tab.locator("#bd-model-status")).to_contain_text(model_back("tiny"))
    expect(tab.get_by_label("Model")).to_have_value("tiny")


def test_where_it_looked_is_hidden_if_the_worker_cannot_compute_it(tab: Any, scripted: ScriptedServer):
    enter(tab)
    choose_model(tab, "tiny")
    expect(tab.locator("#bd-look-panel")).to_be_visible()
    choose_model(tab, "scripted")
    expect(tab.locator("#bd-look-panel")).to_be_hidden()


def test_answers_are_markdown_and_never_html(tab: Any, scripted: ScriptedServer):
    scripted.say(
        "**Left** a<b and c>d {{value}} ${value} [x](javascript:alert(1))\n\n",
        "<img src=x onerror=alert(1)>\n\n- one\n- two\n",
    )
    enter(tab)
    choose_model(tab, "scripted")
    load_example(tab)
    ask(tab, "<b>Where</b> {{is}} ${it}?")
    wait_for_answer(tab)
    answer = answers(tab).last
    text = answer.inner_text()
    assert "Left a<b and c>d {{value}} ${value} [x](javascript:alert(1))" in text
    assert "<img src=x onerror=alert(1)>" in text
    expect(answer.locator("strong")).to_have_text("Left")
    expect(answer.locator("li")).to_have_count(2)
    assert answer.locator("a, img, script").count() == 0
    expect(tab.locator("#bd-chat .user p")).to_have_text("<b>Where</b> {{is}} ${it}?")


def test_an_answer_names_its_image_and_settings(tab: Any, scripted: ScriptedServer):
    scripted.say("First.")
    enter(tab)
    choose_model(tab, "scripted")
    load(tab, patient_dicom())
    expect(tab.locator("#bd-facts")).to_contain_text("CT")
    tab.get_by_label("Window", exact=True).click()
    tab.get_by_role("option", name="lung").click()
    expect(tab.locator("#bd-viewer")).to_contain_text(window(-600, 1500))
    ask(tab, "One?")
    wait_for_answer(tab)
    tab.get_by_label("Window", exact=True).click()
    tab.get_by_role("option", name="bone").click()
    expect(tab.locator("#bd-viewer")).to_contain_text(window(480, 2500))
    ask(tab, "Two?")
    expect(answers(tab)).to_have_count(2)
    wait_for_answer(tab)
    first, second = (tab.locator("#bd-chat .bd-source").nth(index) for index in range(2))
    for source, values in ((first, (-600, 1500)), (second, (480, 2500))):
        expect(source).to_contain_text("Image 1: CT")
        expect(source).to_contain_text("model scripted")
        expect(source).to_contain_text(window(*values))
    assert first.locator("img").get_attribute("src") != second.locator("img").get_attribute("src")


def test_the_scroll_position_stays_while_an_answer_streams(tab: Any, scripted: ScriptedServer):
    lines = [f"line {index}\n\n" for index in range(90)]
    scripted.say(*lines, allow=40)
    enter(tab)
    choose_model(tab, "scripted")
    load_example(tab)
    ask(tab, "Tell me everything.")
    expect(answers(tab).last).to_contain_text("line 39")
    wait_until(lambda: below_end(tab) < 5, 60, "the chat's end in view")
    tab.locator("#bd-chat").hover()
    tab.mouse.wheel(0, -100_000)
    wait_until(lambda: scroll_top(tab) == 0, 60, "the chat's top in view")
    scripted.num_allowed = 70
    expect(answers(tab).last).to_contain_text("line 69")
    assert scroll_top(tab) == 0
    tab.mouse.wheel(0, 100_000)
    wait_until(lambda: below_end(tab) < 5, 60, "the chat's end in view")
    scripted.num_allowed = 90
    expect(answers(tab).last).to_contain_text("line 89")
    wait_until(lambda: below_end(tab) < 5, 60, "the chat's end in view")


def test_an_upload_shows_its_progress(tab: Any):
    enter(tab)
    network = tab.context.new_cdp_session(tab)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 300_000}
    network.send("Network.emulateNetworkConditions", slow)
    load(tab, png_of_bytes(900_000))
    bar = tab.get_by_role("progressbar", name="Upload")
    expect(bar).to_be_visible()
    wait_until(lambda: 0 < bar.evaluate("bar => bar.value") < 1, 60, "part of the upload")
    expect(tab.locator("#bd-drop")).to_contain_text("Uploading:")
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    expect(bar).to_be_hidden()


def png_of_bytes(num_bytes: int) -> bytes:
    """A PNG of about this size: noise does not compress."""
    from helpers.serving import png

    edge = round((num_bytes / 3) ** 0.5)
    return png(size=(edge, edge))


def test_a_failed_upload_is_reported_next_to_the_image(browser: Any, parts: Parts, tmp_path: Path):
    with visitor(browser, parts) as tab:
        enter(tab)
        beside_image = tab.locator("#bd-image-status")
        load_example(tab)
        before = shown(tab)
        tab.context.route("**/page/upload", lambda route: route.abort())
        load(tab, patient_dicom())
        expect(beside_image).to_contain_text(SENTENCES["upload_broken"])
        expect(tab.get_by_role("progressbar", name="Upload")).to_be_hidden()
        large = tmp_path / "large.dcm"
        large.touch()
        os.truncate(large, 129 * 2**20)
        tab.locator("#bd-file").set_input_files(large)
        expect(beside_image).to_contain_text("larger than the limit of 128 MB")
        # The message is between the drop zone and the image, and the earlier image stays.
        boxes = [box_of(tab.locator(f"#bd-{name}")) for name in ("drop", "image-status", "viewer")]
        assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"] and boxes[1]["x"] < boxes[2]["x"] + boxes[2]["width"]
        assert shown(tab) == before
        tab.context.unroute("**/page/upload")
        load(tab, patient_dicom())
        expect(tab.locator("#bd-facts")).not_to_contain_text("Real CT")
        expect(beside_image).to_be_hidden()


def _set_up(tab: Any, scripted: ScriptedServer) -> str:
    """An image under a chosen window, settings, a theme, a finished answer and half of another. Returns the image."""
    scripted.say("The first ", "answer.")
    choose_model(tab, "scripted")
    load(tab, patient_dicom())
    expect(tab.locator("#bd-facts")).to_contain_text("CT")
    number(tab, "width").fill("777")
    number(tab, "width").press("Tab")
    expect(tab.locator("#bd-viewer")).to_contain_text("width 777")
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_role("spinbutton", name="Temperature").fill("0.4")
    tab.get_by_role("spinbutton", name="Temperature").press("Tab")
    tab.get_by_role("button", name="Light / dark").click()
    ask(tab, "One?")
    assert wait_for_answer(tab) == "The first answer."
    scripted.say("The second ", "answer.", allow=1)
    ask(tab, "Two?")
    expect(answers(tab)).to_have_count(2)
    expect(answers(tab).last).to_have_text("The second")
    question_box(tab).fill("A draft")
    return shown(tab)


def _check(tab: Any, image: str) -> None:
    expect(tab.locator("#bd-viewer")).to_contain_text("width 777")
    assert shown(tab) == image
    expect(number(tab, "width")).to_have_value("777")
    expect(answers(tab)).to_have_count(2)
    expect(answers(tab).first).to_have_text("The first answer.")
    expect(tab.get_by_label("Model")).to_have_value("scripted")
    expect(question_box(tab)).to_have_value("A draft")
    wait_until(lambda: tab.evaluate("document.body.classList.contains('dark')"), 60, "the dark theme")
    tab.get_by_role("button", name="Settings").click()
    expect(tab.get_by_role("spinbutton", name="Temperature")).to_have_value("0.4")


def test_a_reload_loses_nothing(tab: Any, scripted: ScriptedServer):
    enter(tab)
    image = _set_up(tab, scripted)
    tab.reload()
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    _check(tab, image)
    # The running answer continues and can be stopped.
    expect(tab.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    scripted.num_allowed = 2
    expect(answers(tab).last).to_have_text("The second answer.")
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(question_box(tab)).to_have_value("A draft")


def test_15_seconds_without_a_network_lose_nothing(browser: Any, parts: Parts, scripted: ScriptedServer):
    with visitor(browser, parts) as tab:
        enter(tab)
        image = _set_up(tab, scripted)
        tab.context.set_offline(True)
        expect(tab.locator("#bd-connection")).to_have_text(CONNECTION["lost"])
        before = scripted.num_finished
        scripted.num_allowed = 2
        wait_until(lambda: scripted.num_finished > before, 60, "the end of the answer")
        tab.wait_for_timeout(OFFLINE_MS)
        tab.context.set_offline(False)
        expect(answers(tab).last).to_have_text("The second answer.")
        _check(tab, image)
        expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_a_restart_of_the_server_is_reported(browser: Any, parts: Parts, scripted: ScriptedServer):
    scripted.say("Fine.")
    with visitor(browser, parts) as tab:
        enter(tab)
        choose_model(tab, "scripted")
        load_example(tab)
        stop_all([parts.page])
        parts.page = parts.start_page()
        wait_until(parts.page_answers, START_S, "the web UI")
        expect(tab.locator("#bd-status")).to_contain_text(SENTENCES["session_gone"])
        expect(tab.get_by_label("Model")).to_have_value("scripted")
        load_example(tab)
        ask(tab, "Are you fine?")
        assert wait_for_answer(tab) == "Fine."
