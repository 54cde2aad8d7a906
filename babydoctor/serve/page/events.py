"""The assembled web UI: the handler of each component's events, the notice at the start, and the list of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from babydoctor.serve.page import html as show
from babydoctor.serve.page import texts
from babydoctor.serve.page.certainty.handlers import CertaintyHandlers
from babydoctor.serve.page.chat_handlers import AnswerHandlers, ConversationHandlers
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.conversation.look import LookHandlers
from babydoctor.serve.page.conversation.stored import kept_boxes, stored_settings, tab_values, typed_texts
from babydoctor.serve.page.conversation.wiring import (
    connect_draft,
    connect_kept,
    connect_look,
    connect_turns,
    look_outputs,
)
from babydoctor.serve.page.examples import build_examples
from babydoctor.serve.page.handlers import Changes, Handlers, shows_errors_async
from babydoctor.serve.page.image_handlers import ImageHandlers
from babydoctor.serve.page.layout import Layout, script
from babydoctor.serve.page.pacs.handlers import PacsHandlers, StoreHandlers
from babydoctor.serve.page.privacy.search import TextHandlers
from babydoctor.serve.page.session import Session, Sessions
from babydoctor.serve.page.study.handlers import StudyHandlers
from babydoctor.serve.page.study.uploads import StudyUploads
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.uploads import Uploads
from babydoctor.serve.page.viewer.handlers import ViewerHandlers
from babydoctor.serve.settings import DicomWebServer

# Gradio's queue is off, because its stream to the browser, and a running answer with it, breaks with the connection.
# Tasks on the server receive answers, and a timer in the tab polls for them.
#
# Gradio's own checks of values are off, because for a number outside a slider's range, or a model that is no longer in
# the list, they raise an error that the user does not see. Handlers check their inputs.
PRIVATE: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "queue": False,
    "preprocess": False,
}
LATEST: dict[str, Any] = PRIVATE | {"trigger_mode": "always_last"}
ONCE: dict[str, Any] = PRIVATE | {"trigger_mode": "once"}


class WebUI:
    """The web UI.

    Args:
        client: client of the controller.
        uploads: uploaded files that no session has taken yet.
        feedback_file: None: no feedback form.
        pacs: PACS that images may be loaded from.
    """

    def __init__(
        self,
        client: ControllerClient,
        uploads: Uploads,
        feedback_file: Path | None,
        pacs: Sequence[DicomWebServer] = (),
    ) -> None:
        self.pacs = pacs
        self.client = client
        self.uploads = uploads
        self.feedback_file = feedback_file
        self.studies = StudyUploads()
        self.sessions = Sessions()
        self.examples = {example.key: example for example in build_examples()}

    def build(self) -> gr.Blocks:
        """Create the components and connect them with their handlers."""
        with gr.Blocks(title="BabyDoctor", analytics_enabled=False) as demo:
            self.ui = Layout([*self.examples.values()], self.feedback_file is not None, self.pacs)
            self.images = ImageHandlers(self.ui, self.sessions, self.client, self.uploads, self.examples)
            self.text = TextHandlers(self.ui, self.sessions, self.client)
            self.talk = ConversationHandlers(self.ui, self.sessions, self.client, self.text)
            self.look = LookHandlers(self.ui, self.sessions, self.client)
            self._connect_tab(demo)
            self._connect_image()
            self._connect_chat()
            if self.pacs:
                self._connect_pacs()
        return demo

    @property
    def _image(self) -> list[Any]:
        ui = self.ui
        image = [ui.viewer, ui.text_boxes, ui.window_group, ui.preset, ui.center, ui.width, ui.frame, ui.facts]
        return [*image, ui.study.list, ui.study.state, ui.image_status]

    @property
    def _chat(self) -> list[Any]:
        ui = self.ui
        chat = [ui.chat, ui.turn_note, ui.question, ui.send, ui.stop, ui.follow, ui.status]
        return [*chat, ui.overlay, ui.words, ui.look_status, ui.certainty.result]

    def _connect_tab(self, demo: gr.Blocks) -> None:
        ui = self.ui
        tab = TabHandlers(ui, self.sessions, self.client, self.images, self.talk, self.look)
        models = [ui.model, ui.model_status, ui.look_panel]
        settings = [ui.model, ui.temperature, ui.top_p, ui.max_tokens]
        gate = [ui.gate, ui.main, ui.passed, *models]
        shown = [*self._image, *self._chat, *look_outputs(ui), *kept_boxes(ui)]
        restored = list(dict.fromkeys([*gate, *settings, *shown]))
        demo.load(
            tab.on_load,
            [ui.passed, ui.preferences, ui.tab],
            restored,
            js=script("restore(passed, preferences)", "passed, preferences, tab"),
            **PRIVATE,
        ).then(self.text.on_view, None, [ui.viewer, ui.text_boxes, ui.image_status], **PRIVATE)
        demo.unload(tab.on_unload)
        ui.theme.click(None, js=script("toggleTheme()", "...none"))
        ui.timer.tick(tab.on_tick, [ui.model], models, **PRIVATE)
        ui.model.input(tab.on_tick, [ui.model], models, **LATEST)
        ui.agree.change(lambda agreed: gr.Button(interactive=agreed), [ui.agree], [ui.enter], **PRIVATE)
        entered = script("enter(agreed)", "agreed")
        ui.enter.click(tab.on_enter, [ui.agree, ui.tab], gate, js=entered, **PRIVATE, trigger_mode="multiple")
        # The browser keeps the settings in its local storage.
        as_list = "(model, temperature, top_p, max_tokens) => [[model, temperature, top_p, max_tokens]]"
        changes = [ui.model.change, ui.temperature.change, ui.top_p.change, ui.max_tokens.change]
        gr.on(changes, None, settings, [ui.preferences], js=as_list)

    def _connect_image(self) -> None:
        ui = self.ui
        loaded = [*self._image, *self._chat]
        study = StudyHandlers(ui, self.sessions, self.client, self.images, self.studies)
        uploaded = ui.drop.upload(study.on_upload, None, loaded, **PRIVATE)
        canvas = ViewerHandlers(ui, self.sessions, self.client, self.images)
        changed = [
            uploaded.then(None, js=script("uploadDone()", "...none")),
            ui.gallery.select(self.images.on_example, None, loaded, **PRIVATE),
            ui.frame.input(self.images.on_frame, [ui.frame], self._image, **LATEST),
            ui.preset.input(self.images.on_preset, [ui.preset], self._image, **LATEST),
            ui.canvas.change(canvas.on_arrange, None, self._image, **LATEST),
            ui.study.list.select(study.on_choose, None, loaded, **PRIVATE),
            ui.study.canvas.select(study.on_second, None, loaded, **PRIVATE),
        ]
        # "release" also fires when a number box loses focus, after Gradio has clamped the number to the slider's range.
        moved = [ui.center.input, ui.width.input, ui.center.release, ui.width.release]
        changed.append(gr.on(moved, self.images.on_window, [ui.center, ui.width], self._image, **LATEST))
        text = [ui.viewer, ui.text_boxes, ui.image_status]
        for change in changed:
            change.then(self.text.on_view, None, text, **LATEST)
        ui.text_boxes.select(self.text.on_box, None, text, **PRIVATE)

    def _connect_pacs(self) -> None:
        handlers = PacsHandlers(self.ui, self.sessions, self.client, self.studies, self.pacs)
        panel, store = self.ui.pacs, self.ui.store
        form = [panel.server, panel.patient, panel.accession, panel.date]
        searches = [panel.search.click, panel.patient.submit, panel.accession.submit, panel.date.submit]
        gr.on(searches, handlers.on_search, form, [panel.results, panel.status], **ONCE)
        picked = [panel.results, panel.status, panel.ticket, panel.patient, panel.accession, panel.form, panel.keep]
        panel.results.select(handlers.on_pick, [panel.keep], picked, **ONCE).then(
            None, [panel.ticket], [panel.ticket], js=script("loadTicket(ticket)", "ticket")
        )
        storing = StoreHandlers(self.ui, self.sessions, self.client)
        store.store.click(storing.on_store, [store.agree], [store.agree, store.status], **ONCE)

    def _connect_chat(self) -> None:
        ui, talk = self.ui, self.talk
        settings = [ui.model, ui.temperature, ui.top_p, ui.max_tokens]
        # Wait for the canvas, so that the question is about what the user sees, also right after a drag.
        settled: dict[str, Any] = {"js": script("settled(inputs)", "...inputs", "viewer.js")}
        asked = [*self._chat, ui.viewer, ui.text_boxes]
        asks = [ui.send.click, ui.question.submit]
        gr.on(asks, talk.on_ask, [ui.question, *settings], asked, **PRIVATE, **settled)
        ui.again.click(talk.on_again, settings, asked, **PRIVATE, **settled)
        ui.follow.tick(talk.on_follow, [ui.question], self._chat, **ONCE)
        ui.stop.click(talk.on_stop, None, [ui.stop, ui.status], **PRIVATE)
        ui.clear.click(talk.on_clear, None, self._chat, **PRIVATE)
        ui.starters.select(talk.on_starter, None, [ui.question], **PRIVATE)
        answers = AnswerHandlers(ui, self.sessions, self.client, self.feedback_file)
        ui.export.click(answers.on_export, None, [ui.exported, ui.status], **PRIVATE).then(
            None, [ui.exported], None, js=script("download(text)", "text")
        )
        connect_look(ui, self.look, PRIVATE)
        connect_turns(ui, self.sessions, self.client, self._chat, PRIVATE)
        connect_draft(ui, self.sessions, self.client, PRIVATE)
        connect_kept(ui)
        sure = CertaintyHandlers(ui, self.sessions, self.client)
        ui.certainty.sample.click(sure.on_sample, None, [ui.certainty.result, ui.status], **ONCE)
        ui.certainty.hide.click(sure.on_hide, None, [ui.certainty.result, ui.status], **ONCE)
        feedback = [ui.verdict, ui.errors, ui.comment, ui.consent, ui.with_image]
        ui.save.click(answers.on_save, feedback, [*feedback, ui.saved, ui.status], **PRIVATE)


class TabHandlers(Handlers):
    """Handlers of a whole tab: loading, the notice at the start, the list of models.

    Args:
        images: restores the image after a reload.
        talk: restores the conversation.
        look: restores "Where it looked".
    """

    def __init__(
        self,
        ui: Layout,
        sessions: Sessions,
        client: ControllerClient,
        images: ImageHandlers,
        talk: ConversationHandlers,
        look: LookHandlers,
    ) -> None:
        super().__init__(ui, sessions, client)
        self.images = images
        self.talk = talk
        self.look = look

    @property
    def status(self) -> Any:
        return self.ui.model_status

    @shows_errors_async
    async def on_load(self, passed: bool, preferences: Any, tab: str, request: gr.Request) -> Changes:
        """Handle the opening or reload of a tab. A reload restores everything in the session."""
        values = tab_values(tab)
        session = self.sessions.attach(request.session_hash, str(values.get("token", "")))
        typed = typed_texts(self.ui, values)
        if passed is not True:
            return typed  # The notice is visible from the start; a late reply must not bring it back.
        was_known = session.has_accepted
        model, settings = stored_settings(self.ui, preferences)
        changes = settings | await self._open(session, model) | typed
        if was_known:
            draft = typed.get(self.ui.question, "")
            changes |= self.images.show_scan(session) | self.look.shown(session)
            changes |= self.chat(session) if session.is_answering else self.talk.finished(session, draft)
        elif values.get("copied"):
            changes[self.ui.status] = show.status(texts.SENTENCES["second_tab"], "info")
        elif values.get("reloaded"):
            changes[self.ui.status] = show.status(texts.SENTENCES["session_gone"], "warning")
        return changes

    @shows_errors_async
    async def on_enter(self, agreed: bool, tab: str, request: gr.Request) -> Changes:
        """Handle "Continue": the user has accepted the notice, perhaps before ``on_load`` was called."""
        if not agreed:
            return {}
        session = self.sessions.attach(request.session_hash, str(tab_values(tab).get("token", "")))
        return await self._open(session, None) | {self.ui.passed: True}

    @shows_errors_async
    async def on_tick(self, model: str | None, request: gr.Request) -> Changes:
        """Refresh the list of models. A chosen model that is not running stays chosen, with a message to the user."""
        session = self.sessions.get(request.session_hash)
        return await self._models(session, model) if session.has_accepted else {}

    def on_unload(self, request: gr.Request) -> None:
        """Handle a tab that was closed, reloaded or disconnected."""
        self.sessions.leave(request.session_hash)

    async def _open(self, session: Session, model: str | None) -> Changes:
        session.has_accepted = True
        opened: Changes = {self.ui.gate: gr.Column(visible=False), self.ui.main: gr.Row(visible=True)}
        return opened | await self._models(session, model)

    async def _models(self, session: Session, model: str | None) -> Changes:
        try:
            running = await self.client.models()
        except PageError as error:
            # Keep the list and the choice.
            return {
                self.ui.model: gr.Dropdown(choices=[model] if model else [], value=model, visible=True),
                self.ui.model_status: self.sentence(error),
            }
        choices: list[Any] = [*running]
        note = ""
        if model and model not in running:
            choices = [(f"{model} (not running)", model), *choices]
            session.missing_model = model
            note = show.status(texts.model_gone(model), "warning")
        elif model and model == session.missing_model:
            session.missing_model = ""
            note = show.status(texts.model_back(model), "info")
        elif not running:
            note = self.sentence(PageError("no_worker"))
        chosen = model or (running[0] if running else None)
        shows_attention = chosen in running and await self.client.shows_attention(str(chosen))
        return {
            self.ui.model: gr.Dropdown(choices=choices, value=chosen, visible=True),
            self.ui.model_status: note,
            self.ui.look_panel: gr.Accordion(visible=shows_attention),
        }
