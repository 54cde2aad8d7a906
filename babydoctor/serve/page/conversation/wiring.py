"""Connects the components of the conversation with their handlers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.conversation.draft_handlers import DraftHandlers
from babydoctor.serve.page.conversation.look import LookHandlers
from babydoctor.serve.page.conversation.stored import kept_boxes
from babydoctor.serve.page.conversation.turns import TurnHandlers
from babydoctor.serve.page.layout import Layout, script
from babydoctor.serve.page.session import Sessions

FILE = "conversation.js"


def look_outputs(ui: Layout) -> list[Any]:
    """The components that ``LookHandlers.shown`` changes."""
    return [ui.look, ui.look_progress, ui.look_cancel, ui.look_timer, ui.look_status, ui.overlay, ui.words]


def connect_look(ui: Layout, handlers: LookHandlers, event: Mapping[str, Any]) -> None:
    """Connect "Where it looked".

    Args:
        event: options of every event.
    """
    shown = look_outputs(ui)
    focus = script("moveFocus('bd-look', 'bd-look-cancel')", "...none", FILE)
    ui.look.click(handlers.on_look, None, shown, **event).then(None, js=focus)
    ui.look_cancel.click(handlers.on_cancel, None, shown, **event).then(None, js=focus)
    ui.look_timer.tick(handlers.on_follow, None, shown, **event, trigger_mode="once").then(None, js=focus)
    ui.words.select(handlers.on_word, None, [ui.overlay, ui.look_status], **event)


def connect_turns(
    ui: Layout, sessions: Sessions, client: ControllerClient, chat: Sequence[Any], event: Mapping[str, Any]
) -> None:
    """Connect the buttons of individual turns and "Copy all".

    Args:
        chat: the components that the conversation changes.
    """
    turns = TurnHandlers(ui, sessions, client)
    report = [ui.findings, ui.impression]
    ui.chat.select(turns.on_turn, [ui.question, *report], [*chat, *report, ui.report_panel], **event)
    ui.turn_note.select(turns.on_note, [ui.question], [*chat], **event)
    ui.copy_all.click(None, js=script("copyAll()", "...none", FILE))


def connect_draft(ui: Layout, sessions: Sessions, client: ControllerClient, event: Mapping[str, Any]) -> None:
    """Connect the report draft."""
    drafts = DraftHandlers(ui, sessions, client)
    sections = [ui.technique, ui.findings, ui.impression]
    ui.assemble.click(drafts.on_assemble, sections, [*sections, ui.report_status], **event)
    saves = (
        (ui.save_text, drafts.on_text),
        (ui.save_html, drafts.on_html),
        (ui.save_dicom, drafts.on_dicom),
    )
    for button, handler in saves:
        button.click(handler, sections, [ui.report_file, ui.report_status], **event).then(
            None, [ui.report_file], None, js=script("saveFile(file)", "file", FILE)
        )


def connect_kept(ui: Layout) -> None:
    """Keep the content of text boxes in the browser, also when a handler changes it."""
    for box in kept_boxes(ui):
        box.change(None, [box], None, js=script(f"keepText('{box.elem_id}', text)", "text", FILE))
