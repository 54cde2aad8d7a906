"""What happens when something on the page is used.

Handlers get Gradio's session hash, find the session, change it, and return how the page changes. A ``PageError``
becomes a sentence above the question box; nothing else reaches the user.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from babydoctor.schema import IMAGE_TOKEN
from babydoctor.serve import web_view as show
from babydoctor.serve.logs import log
from babydoctor.serve.web import MAX_UPLOAD_BYTES, Uploads
from babydoctor.serve.web_chat import ControllerClient
from babydoctor.serve.web_dicom import FILE_WINDOW, open_scan
from babydoctor.serve.web_errors import PageError
from babydoctor.serve.web_examples import build_examples, gallery_html
from babydoctor.serve.web_feedback import VERDICTS, build_row, export_session, save_row
from babydoctor.serve.web_layout import Layout
from babydoctor.serve.web_overlay import group_words, place_on_image, to_data_url
from babydoctor.serve.web_session import Exchange, Sampling, Session, Sessions
from babydoctor.serve.web_style import DOWNLOAD_SCRIPT, THEME_SCRIPT

logger = logging.getLogger(__name__)

Changes = dict[Any, Any]


def _told(handler: Callable[..., Changes]) -> Callable[..., Changes]:
    """Show a ``PageError`` as a sentence, and any other error as one without its text."""

    @functools.wraps(handler)
    def call(self: Page, *args: Any) -> Changes:
        try:
            return {self.ui.status: show.status("")} | handler(self, *args)
        except Exception as error:
            return {self.ui.status: self.sentence(error)}

    return call


def _told_async(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    async def call(self: Page, *args: Any) -> Changes:
        try:
            return {self.ui.status: show.status("")} | await handler(self, *args)
        except Exception as error:
            return {self.ui.status: self.sentence(error)}

    return call


class Page:
    """The page.

    Args:
        client: asks the controller.
        uploads: files that wait to be taken.
        feedback_file: None: no feedback is taken.
    """

    def __init__(self, client: ControllerClient, uploads: Uploads, feedback_file: Path | None) -> None:
        self.client = client
        self.uploads = uploads
        self.feedback_file = feedback_file
        self.sessions = Sessions()
        self.examples = {example.key: example for example in build_examples()}

    def close(self) -> None:
        """Stop all running answers."""
        self.sessions.stop_all()

    def sentence(self, error: Exception) -> str:
        """An error as it is shown."""
        if not isinstance(error, PageError):
            log(logger, logging.ERROR, "page failed", exception=type(error).__name__, place=_place(error))
            error = PageError("internal")
        return show.status(error.sentence)

    def build(self) -> gr.Blocks:
        """Lay the page out and connect it."""
        with gr.Blocks(title="BabyDoctor", analytics_enabled=False) as demo:
            self.ui = Layout(gallery_html([*self.examples.values()]), self.feedback_file is not None)
            self._connect(demo)
        return demo

    def _connect(self, demo: gr.Blocks) -> None:
        image = [
            self.ui.viewer,
            self.ui.window_group,
            self.ui.preset,
            self.ui.center,
            self.ui.width,
            self.ui.frame,
            self.ui.facts,
        ]
        chat = [
            self.ui.chat,
            self.ui.question,
            self.ui.send,
            self.ui.stop,
            self.ui.status,
            self.ui.overlay,
            self.ui.words,
        ]
        gate = [self.ui.gate, self.ui.main, self.ui.model, self.ui.status, self.ui.passed]
        # Only answers go through Gradio's queue. Its stream to the browser ends with the last queued event; one that
        # joins in that moment is not heard: an answer would stand still because the list of models was refreshed.
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        queued: dict[str, Any] = private | {"queue": True}
        latest: dict[str, Any] = private | {"trigger_mode": "always_last"}

        demo.load(self.on_load, [self.ui.passed], gate, **private)
        demo.unload(self.on_unload)
        self.ui.theme.click(None, js=THEME_SCRIPT)
        self.ui.timer.tick(self.on_tick, [self.ui.model], [self.ui.model], **private)
        self.ui.agree.change(lambda agreed: gr.Button(interactive=agreed), [self.ui.agree], [self.ui.enter], **private)
        self.ui.enter.click(self.on_enter, [self.ui.agree], gate, **private)

        loaded = [*image, *chat]
        self.ui.drop.upload(self.on_upload, None, loaded, **private)
        self.ui.gallery.select(self.on_example, None, loaded, **private)
        self.ui.frame.input(self.on_frame, [self.ui.frame], [*image, self.ui.status], **latest)
        self.ui.preset.input(self.on_preset, [self.ui.preset], [*image, self.ui.status], **latest)
        for slider in (self.ui.center, self.ui.width):
            slider.input(self.on_window, [self.ui.center, self.ui.width], [*image, self.ui.status], **latest)

        settings = [self.ui.model, self.ui.temperature, self.ui.top_p, self.ui.max_tokens]
        gr.on([self.ui.send.click, self.ui.question.submit], self.on_ask, [self.ui.question, *settings], chat, **queued)
        self.ui.chat.clear(self.on_clear, None, chat, **private)
        self.ui.again.click(self.on_again, settings, chat, **queued)
        self.ui.stop.click(self.on_stop, None, [self.ui.stop], **private)
        self.ui.clear.click(self.on_clear, None, chat, **private)
        self.ui.starters.select(self.on_starter, None, [self.ui.question], **private)
        self.ui.export.click(self.on_export, None, [self.ui.exported, self.ui.status], **private).then(
            None, [self.ui.exported], None, js=DOWNLOAD_SCRIPT
        )
        self.ui.look.click(self.on_look, None, [self.ui.overlay, self.ui.words, self.ui.status], **private)
        self.ui.words.select(self.on_word, None, [self.ui.overlay, self.ui.status], **private)
        feedback = [self.ui.verdict, self.ui.errors, self.ui.comment, self.ui.consent, self.ui.with_image]
        self.ui.save.click(self.on_save, feedback, [*feedback, self.ui.saved, self.ui.status], **private)

    # Gate and models.

    async def on_load(self, passed: bool, request: gr.Request) -> Changes:
        """A tab was opened, or opened anew."""
        return await self._open_gate(request) if passed is True else {self.ui.gate: gr.Column(visible=True)}

    async def on_enter(self, agreed: bool, request: gr.Request) -> Changes:
        """The user has read the notice."""
        return await self._open_gate(request) | {self.ui.passed: True} if agreed else {}

    async def _open_gate(self, request: gr.Request) -> Changes:
        self.sessions.get(request.session_hash).has_accepted = True
        changes: Changes = {self.ui.gate: gr.Column(visible=False), self.ui.main: gr.Row(visible=True)}
        try:
            models = await self.client.models()
        except PageError as error:
            models = []
            changes[self.ui.status] = self.sentence(error)
        else:
            if not models:
                changes[self.ui.status] = self.sentence(PageError("no_worker"))
        value = models[0] if models else None
        return changes | {self.ui.model: gr.Dropdown(choices=models, value=value, visible=True)}

    async def on_tick(self, model: str | None) -> Any:
        """Keep the list of models fresh; what the user has chosen stays chosen while it is there."""
        try:
            models = await self.client.models()
        except PageError:
            return gr.skip()
        return gr.Dropdown(choices=models, value=model if model in models else (models[0] if models else None))

    def on_unload(self, request: gr.Request) -> None:
        """The tab was closed: forget its image and its conversation."""
        self.sessions.forget(request.session_hash)

    # Image.

    @_told
    def on_upload(self, event: gr.EventData, request: gr.Request) -> Changes:
        """A file has come, or did not come whole."""
        session = self.sessions.accepted(request.session_hash)
        values = event._data or {}
        if "token" not in values:
            raise PageError(str(values.get("error", "upload_broken")), limit_mb=MAX_UPLOAD_BYTES // 2**20)
        return self._show_new(session, self.uploads.take(str(values["token"])), "", "", None)

    @_told
    def on_example(self, event: gr.EventData, request: gr.Request) -> Changes:
        """An example was chosen."""
        session = self.sessions.accepted(request.session_hash)
        example = self.examples[str((event._data or {}).get("example"))]
        return self._show_new(session, example.load(), example.title, example.truth, example.question)

    def _show_new(self, session: Session, data: bytes, title: str, truth: str, question: str | None) -> Changes:
        scan = open_scan(data)
        scan.title, scan.truth = title, truth
        session.start_over()
        session.scan = scan
        changes = self._show_scan(session, moves_sliders=True) | self._idle(session)
        return changes | ({self.ui.question: question} if question else {})

    @_told
    def on_frame(self, frame: float, request: gr.Request) -> Changes:
        """Another frame of a multi-frame file."""
        session = self._with_scan(request)
        assert session.scan is not None
        session.scan.frame = min(max(int(frame), 1), session.scan.num_frames) - 1
        return self._show_scan(session, moves_sliders=False)

    @_told
    def on_preset(self, preset: str, request: gr.Request) -> Changes:
        """The file's own window, or one of the presets for CT."""
        session = self._with_scan(request)
        assert session.scan is not None
        session.scan.center = session.scan.width = None
        session.scan.preset = preset if preset in session.scan.presets and preset != FILE_WINDOW else None
        return self._show_scan(session, moves_sliders=True)

    @_told
    def on_window(self, center: float, width: float, request: gr.Request) -> Changes:
        """The sliders were moved."""
        session = self._with_scan(request)
        assert session.scan is not None
        session.scan.preset = None
        session.scan.center, session.scan.width = float(center), max(1.0, float(width))
        return self._show_scan(session, moves_sliders=False) | {self.ui.preset: gr.Dropdown(value=None)}

    def _with_scan(self, request: gr.Request) -> Session:
        session = self.sessions.accepted(request.session_hash)
        if session.scan is None:
            raise PageError("no_image")
        return session

    def _show_scan(self, session: Session, *, moves_sliders: bool) -> Changes:
        scan = session.scan
        assert scan is not None
        session.view = scan.view()
        changes: Changes = {self.ui.viewer: show.viewer(session.view)}
        if not moves_sliders:  # under the user's hand
            return changes
        changes |= {
            self.ui.facts: show.facts(scan),
            self.ui.window_group: gr.Group(visible=scan.has_window),
            self.ui.preset: gr.Dropdown(choices=scan.presets, value=scan.preset or FILE_WINDOW),
            self.ui.frame: gr.Slider(
                maximum=max(2, scan.num_frames), value=scan.frame + 1, visible=scan.num_frames > 1
            ),
        }
        if scan.has_window:
            at = scan.window_range()
            changes |= {
                self.ui.center: gr.Slider(minimum=at.low, maximum=at.high, step=at.step, value=round(at.center, 3)),
                self.ui.width: gr.Slider(minimum=1, maximum=at.widest, step=at.step, value=round(at.width, 3)),
            }
        return changes

    # Conversation.

    async def on_ask(
        self, question: str, model: str, temperature: float, top_p: float, max_tokens: float, request: gr.Request
    ) -> AsyncIterator[Changes]:
        """A question; yields the answer as it grows."""
        try:
            session = self.sessions.accepted(request.session_hash)
            exchange = self._begin(session, question, model, Sampling(temperature, top_p, int(max_tokens)))
        except PageError as error:
            yield {self.ui.status: self.sentence(error)}
            return
        async for changes in self._answer(session, exchange):
            yield changes

    async def on_again(
        self, model: str, temperature: float, top_p: float, max_tokens: float, request: gr.Request
    ) -> AsyncIterator[Changes]:
        """The last question once more, with the present image and settings."""
        try:
            session = self.sessions.accepted(request.session_hash)
            last = session.last
            if last is None:
                raise PageError("no_answer")
            if not last.ended:
                raise PageError("still_answering")
            session.exchanges.pop()
            try:
                exchange = self._begin(session, last.question, model, Sampling(temperature, top_p, int(max_tokens)))
            except PageError:
                session.exchanges.append(last)
                raise
        except PageError as error:
            yield {self.ui.status: self.sentence(error)}
            return
        async for changes in self._answer(session, exchange):
            yield changes

    def _begin(self, session: Session, question: str, model: str, sampling: Sampling) -> Exchange:
        question = question.strip()
        if session.view is None:
            raise PageError("no_image")
        if not question:
            raise PageError("no_question")
        if IMAGE_TOKEN in question:
            raise PageError("image_in_question")
        if not model:
            raise PageError("no_model")
        if session.last is not None and not session.last.ended:
            raise PageError("still_answering")
        return Exchange(question, model, sampling, session.view)

    async def _answer(self, session: Session, exchange: Exchange) -> AsyncIterator[Changes]:
        turns = session.turns(exchange.question)
        session.exchanges.append(exchange)
        session.words = []
        yield {
            self.ui.chat: show.messages(session),
            self.ui.question: "",
            self.ui.send: gr.Button(visible=False),
            self.ui.stop: gr.Button(visible=True),
            self.ui.status: show.status(""),
            self.ui.overlay: "",
            self.ui.words: "",
        }
        problem = ""
        try:
            async for _ in self.client.answer(exchange, turns):
                yield {self.ui.chat: show.messages(session)}
        except Exception as error:
            problem = self.sentence(error)
            exchange.ended = "error"
            exchange.note = "This answer broke off." if exchange.answer else ""
        finally:
            exchange.ended = exchange.ended or "stopped"
        changes = self._idle(session) | {self.ui.status: problem}
        if problem and not exchange.answer and exchange in session.exchanges:
            # Nothing came: the question goes back into its box, to be sent again.
            session.exchanges.remove(exchange)
            changes |= self._idle(session) | {self.ui.question: exchange.question, self.ui.status: problem}
        yield changes

    def _idle(self, session: Session) -> Changes:
        """The page while no answer runs."""
        return {
            self.ui.chat: show.messages(session),
            self.ui.send: gr.Button(visible=True),
            self.ui.stop: gr.Button(visible=False),
            self.ui.overlay: "",
            self.ui.words: "",
        }

    async def on_stop(self, request: gr.Request) -> Changes:
        """Ask the running answer to end; its own handler then shows what there is."""
        self.sessions.get(request.session_hash).stop()
        return {self.ui.stop: gr.Button(visible=False)}

    @_told
    def on_clear(self, request: gr.Request) -> Changes:
        """A new conversation about the same image."""
        session = self.sessions.accepted(request.session_hash)
        session.start_over()
        return self._idle(session)

    def on_starter(self, event: gr.EventData) -> str:
        """One of the ready-made questions."""
        return str((event._data or {}).get("question", ""))

    # What can be done with an answer.

    @_told
    def on_export(self, request: gr.Request) -> Changes:
        """The session as a file, which the browser makes: nothing is written here."""
        session = self.sessions.accepted(request.session_hash)
        try:
            return {self.ui.exported: export_session(session)}
        except PageError as error:
            return {self.ui.exported: "", self.ui.status: self.sentence(error)}

    @_told_async
    async def on_look(self, request: gr.Request) -> Changes:
        """Fetch the attention of the last answer and show that of the whole of it."""
        session = self.sessions.accepted(request.session_hash)
        exchange = session.last
        if exchange is None or not exchange.answer:
            raise PageError("no_answer")
        if not exchange.ended:
            raise PageError("still_answering")
        reply = await self.client.attention(exchange)
        session.image_mode = await self.client.image_mode(exchange.model)
        session.words = group_words(reply["tokens"], *reply["grid"])
        if not session.words:
            raise PageError("no_answer")
        buttons = show.word_buttons([word for word, _ in session.words])
        return {self.ui.words: buttons, self.ui.overlay: self._overlay(session, 0)}

    @_told
    def on_word(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Another word of the answer."""
        session = self.sessions.accepted(request.session_hash)
        index = int((event._data or {}).get("word", 0))
        if not 0 <= index < len(session.words):
            raise PageError("no_answer")
        return {self.ui.overlay: self._overlay(session, index)}

    def _overlay(self, session: Session, index: int) -> str:
        assert session.last is not None
        view = session.last.view
        word, grid = session.words[index]
        weights = place_on_image(grid, view.width, view.height, session.image_mode)
        return show.overlay(view, to_data_url(weights), word)

    @_told
    def on_save(
        self,
        verdict: str | None,
        errors: list[str],
        comment: str,
        consent: bool,
        with_image: bool,
        request: gr.Request,
    ) -> Changes:
        """Feedback; saved only with consent."""
        session = self.sessions.accepted(request.session_hash)
        try:
            if session.last is None or not session.last.ended or self.feedback_file is None:
                raise PageError("no_answer")
            if not consent:
                raise PageError("no_consent")
            if verdict not in VERDICTS and not errors and not comment.strip():
                raise PageError("no_verdict")
            row = build_row(
                session,
                session.last,
                verdict=verdict,
                errors=errors,
                comment=comment,
                with_image=with_image,
            )
            save_row(self.feedback_file, row)
        except PageError as error:
            return {self.ui.saved: self.sentence(error)}
        thanks = "Saved with the image. Thank you." if with_image else "Saved without the image. Thank you."
        return {
            self.ui.verdict: None,
            self.ui.errors: [],
            self.ui.comment: "",
            self.ui.consent: False,
            self.ui.with_image: False,
            self.ui.saved: show.status(thanks, "info"),
        }


def _place(error: Exception) -> str:
    """Where in the code it happened; the message stays out of the log, for it may quote a file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
