"""The conversation in Chromium: turns, report draft, progress of a map, lost connection, copies of a tab, layout."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pydicom
import pytest
from helpers.serving import png, wait_until
from helpers.web_ui import (
    Parts,
    ScriptedServer,
    answers,
    ask,
    axe_violations,
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
    switch_scheme,
    tab,
    visitor,
    wait_for_answer,
)

from babydoctor.serve.page.texts import CONNECTION, NO_LOCALIZATION, NOT_CLINICAL, SENTENCES

pytestmark = [needs_chromium, pytest.mark.slow]

__all__ = ["browser", "parts", "scripted", "tab"]


def talk(tab: Any, scripted: ScriptedServer, *turns: tuple[str, str]) -> None:
    """Questions that the scripted model answers as given."""
    for question, answer in turns:
        scripted.say(answer)
        ask(tab, question)
        assert wait_for_answer(tab) == answer


def questions(tab: Any) -> list[str]:
    return tab.locator("#bd-chat .user p").all_inner_texts()


def asked(scripted: ScriptedServer) -> list[str]:
    """The user's turns of the last request, without the image."""
    texts = []
    for message in scripted.last_request["messages"]:
        if message["role"] == "user":
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            texts.append("".join(part["text"] for part in parts if part["type"] == "text").strip())
    return texts


def test_turns_are_edited_deleted_and_copied_by_keyboard(tab: Any, scripted: ScriptedServer):
    enter(tab)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose_model(tab, "scripted")
    load_example(tab)
    talk(tab, scripted, ("One?", "The first answer."), ("Two?", "The second answer."), ("Three?", "The third answer."))

    # Arrow up edits the last question, Escape cancels the edit, and the draft comes back.
    tab.keyboard.press("ArrowUp")
    expect(question_box(tab)).to_have_value("Three?")
    tab.keyboard.press("Escape")
    expect(question_box(tab)).to_have_value("")
    question_box(tab).fill("A draft")
    tab.get_by_role("button", name="Edit question 2").press("Enter")
    expect(question_box(tab)).to_be_focused()
    expect(question_box(tab)).to_have_value("Two?")
    expect(tab.locator("#bd-turn-note")).to_contain_text("and the question after it")
    scripted.say("Another second answer.")
    question_box(tab).fill("Two, again?")
    tab.keyboard.press("Enter")
    expect(answers(tab).last).to_have_text("Another second answer.")
    expect(question_box(tab)).to_have_value("A draft")
    assert questions(tab) == ["One?", "Two, again?"] and asked(scripted) == ["One?", "Two, again?"]

    # What was replaced and what was deleted can come back.
    tab.get_by_role("button", name="Undo").press("Enter")
    expect(answers(tab)).to_have_count(3)
    tab.get_by_role("button", name="Delete question 1 and its answer").press("Enter")
    expect(answers(tab)).to_have_count(2)
    expect(tab.get_by_role("region", name="Conversation")).to_be_focused()
    tab.get_by_role("button", name="Undo").press("Enter")
    expect(answers(tab)).to_have_count(3)
    tab.get_by_role("button", name="Delete question 2 and its answer").press("Enter")
    expect(answers(tab)).to_have_count(2)

    tab.get_by_role("button", name="Copy all").press("Enter")
    expect(tab.get_by_role("button", name="Copied")).to_be_visible()
    text = tab.evaluate("navigator.clipboard.readText()")
    assert text.startswith("Research use only") and "Question: One?\nAnswer: The first answer.\n(Image 1" in text
    assert "Two?" not in text and "Answer: The third answer." in text


def test_a_failed_regeneration_brings_the_old_answer_back(tab: Any, parts: Parts, scripted: ScriptedServer):
    enter(tab)
    choose_model(tab, "scripted")
    load_example(tab)
    talk(tab, scripted, ("One?", "The first answer."))
    scripted.say("New", " words", allow=0)
    tab.get_by_role("button", name="Regenerate").click()
    expect(answers(tab).last).to_have_text("…")
    tab.get_by_role("button", name="Stop", exact=True).click()
    tab.get_by_role("button", name="Undo").click()
    expect(answers(tab)).to_have_text(["The first answer."])
    scripted.num_allowed = 2


def test_a_report_draft_from_answers_to_three_files(tab: Any, scripted: ScriptedServer):
    enter(tab)
    choose_model(tab, "scripted")
    load(tab, patient_dicom())
    expect(tab.locator("#bd-facts")).to_contain_text("CT")
    talk(tab, scripted, ("Is there a mass?", "No."), ("What is seen?", "A normal <b>spine</b> & disc."))
    tab.get_by_role("button", name="Add answer 2 to the impression").click()
    impression = tab.get_by_label("Impression", exact=True)
    expect(impression).to_have_value("A normal <b>spine</b> & disc.")
    tab.get_by_role("button", name="Add all answers to the draft").click()
    findings = tab.get_by_label("Findings", exact=True)
    expect(findings).to_have_value("Is there a mass? No.\nA normal <b>spine</b> & disc.")
    findings.press("Control+End")
    findings.type("\nTyped by hand.")
    # Adding the answers again removes and repeats nothing. A reload restores all text.
    tab.get_by_role("button", name="Add all answers to the draft").click()
    tab.reload()
    written = "Is there a mass? No.\nA normal <b>spine</b> & disc.\nTyped by hand."
    tab.locator("#bd-report > button").click()
    expect(findings).to_have_value(written)

    files = {}
    for kind, ending in (("text", "txt"), ("HTML", "html"), ("DICOM SR", "dcm")):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=f"Save as {kind}").click()
        assert re.fullmatch(rf"babydoctor-report-[\d-]+\.{ending}", download.value.suggested_filename)
        files[ending] = Path(download.value.path()).read_bytes()
    text = files["txt"].decode()
    assert text.count(NOT_CLINICAL) == 2 and f"FINDINGS\n{written}\n" in text and "TECHNIQUE\nImage 1: CT" in text
    html = files["html"].decode()
    assert NOT_CLINICAL in html and "&lt;b&gt;spine" in html and "<b>spine" not in html and "data:image/png" in html
    report = pydicom.dcmread(io.BytesIO(files["dcm"]))
    values = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in report.ContentSequence}
    assert values["Finding"].TextValue == written and values["Impression"].TextValue == impression.input_value()
    assert report.CompletionFlag == "PARTIAL" and "NOT FOR CLINICAL USE" in report.SeriesDescription
    source = pydicom.dcmread(io.BytesIO(patient_dicom()))
    assert report.StudyInstanceUID == source.StudyInstanceUID

    load(tab, png())
    expect(tab.locator("#bd-facts")).not_to_contain_text("CT")
    tab.get_by_role("button", name="Save as DICOM SR").click()
    expect(tab.locator("#bd-report-status")).to_have_text(SENTENCES["report_needs_dicom"])


def test_a_map_shows_its_progress_and_can_be_canceled(tab: Any, parts: Parts):
    enter(tab)
    choose_model(tab, "tiny")
    load_example(tab)
    ask(tab, "What is it?")
    wait_for_answer(tab)
    tab.get_by_role("button", name="Where it looked").click()
    pid = parts.worker.process.pid
    os.kill(pid, signal.SIGSTOP)  # a worker that takes its time
    try:
        tab.get_by_role("button", name="Show for the last answer").press("Enter")
        cancel = tab.get_by_role("button", name="Cancel", exact=True)
        expect(tab.locator("#bd-look-progress progress")).to_be_visible()
        expect(cancel).to_be_focused()
        tab.keyboard.press("Enter")
        expect(tab.locator("#bd-look-status")).to_have_text(SENTENCES["map_canceled"])
        expect(tab.get_by_role("button", name="Show for the last answer")).to_be_focused()
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: parts.queue_length() == 0, 60, "the worker's rest")
    tab.keyboard.press("Enter")
    expect(tab.locator("#bd-overlay img").nth(1)).to_be_visible()
    expect(tab.locator("#bd-look-progress progress")).to_have_count(0)
    expect(tab.locator("#bd-overlay")).to_contain_text(NO_LOCALIZATION)
    # A reload shows the map again.
    tab.reload()
    tab.get_by_role("button", name="Where it looked").click()
    expect(tab.locator("#bd-overlay img").nth(1)).to_be_visible()


def test_feedback_contains_the_time_since_the_answer(tab: Any, parts: Parts, scripted: ScriptedServer):
    enter(tab)
    choose_model(tab, "scripted")
    load_example(tab)
    talk(tab, scripted, ("One?", "The first answer."))
    tab.get_by_role("button", name="Feedback on the last answer").click()
    tab.get_by_label("Comment").fill("typed before a reload")
    tab.reload()
    tab.get_by_role("button", name="Feedback on the last answer").click()
    expect(tab.get_by_label("Comment")).to_have_value("typed before a reload")
    tab.get_by_label("Save my feedback").check()
    tab.get_by_role("button", name="Save feedback").click()
    expect(tab.locator("#bd-saved")).to_contain_text("Saved without the image")
    row = json.loads(parts.feedback.read_text().splitlines()[-1])
    assert row["comment"] == "typed before a reload" and 0 < row["seconds"] < 600


def test_a_lost_connection_is_named_in_our_own_words(browser: Any, parts: Parts):
    with visitor(browser, parts) as tab:
        enter(tab)
        load_example(tab)
        tab.context.set_offline(True)
        line = tab.locator("#bd-connection")
        expect(line).to_have_text(CONNECTION["lost"])
        question_box(tab).fill("Typed without a connection")
        tab.get_by_role("button", name="Send", exact=True).click()
        expect(tab.get_by_text("Attempting reconnection")).to_be_hidden()
        tab.context.set_offline(False)
        expect(line).to_have_text(CONNECTION["back"])
        expect(question_box(tab)).to_have_value("Typed without a connection")
        expect(tab.locator("#bd-viewer img")).to_be_visible()


def test_a_copied_tab_gets_a_new_session_and_keeps_typed_text(browser: Any, parts: Parts):
    with visitor(browser, parts) as tab:
        enter(tab)
        load_example(tab)
        question_box(tab).fill("A draft")
        with tab.expect_popup() as popup:
            tab.evaluate("window.open(location.href)")  # as "Duplicate tab": the browser copies the session storage
        copy = popup.value
        expect(copy.locator("#bd-status")).to_have_text(SENTENCES["second_tab"])
        expect(question_box(copy)).to_have_value("A draft")
        expect(copy.locator("#bd-viewer img")).to_have_count(0)
        # The first tab is untouched, and finds its own session after a reload.
        copy.close()
        tab.reload()
        expect(tab.locator("#bd-viewer img")).to_be_visible()
        expect(question_box(tab)).to_have_value("A draft")


def _open_everything(tab: Any) -> None:
    """An open image, two answers and the overlay."""
    enter(tab)
    choose_model(tab, "tiny")
    load(tab, patient_dicom())
    expect(tab.locator("#bd-preset")).to_be_visible()
    ask(tab, "What is it?")
    wait_for_answer(tab)
    tab.get_by_role("button", name="Where it looked").click()
    tab.get_by_role("button", name="Show for the last answer").click()
    expect(tab.locator("#bd-overlay img").nth(1)).to_be_visible()
    expect(tab.locator("#bd-text-boxes")).not_to_contain_text("Looking for text")


IMPORTANT = ("#bd-canvas canvas", ".bd-tools", "#bd-preset", "#bd-width", "#bd-chat", "#bd-question", "#bd-send",
             "#bd-overlay .bd-pair", "#bd-look")  # fmt: skip


def _check_both_schemes(tab: Any) -> None:
    assert axe_violations(tab) == []
    switch_scheme(tab)
    assert axe_violations(tab) == []


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 800, "light"), (1920, 1080, "dark")])
def test_the_main_parts_are_visible_without_scrolling(browser: Any, parts: Parts, width: int, height: int, scheme: str):
    with visitor(browser, parts, viewport={"width": width, "height": height}, color_scheme=scheme) as tab:
        _open_everything(tab)
        for place in IMPORTANT:
            box = box_of(tab.locator(place).first)
            assert box["y"] >= 0 and box["y"] + box["height"] <= height, (place, box)
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, (place, box)
        _check_both_schemes(tab)


@pytest.mark.parametrize(("width", "height", "scheme"), [(390, 844, "light"), (640, 400, "dark")])
def test_narrow_and_zoomed_pages_do_not_scroll_sideways(
    browser: Any, parts: Parts, width: int, height: int, scheme: str
):
    """640 x 400 is what 200% zoom leaves of 1280 x 800."""
    zoom = 2 if width == 640 else 1
    viewport = {"width": width, "height": height}
    with visitor(browser, parts, viewport=viewport, color_scheme=scheme, device_scale_factor=zoom) as tab:
        _open_everything(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        _check_both_schemes(tab)
