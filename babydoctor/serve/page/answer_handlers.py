"""What can be done with an answer: see where the model looked, judge it, export the session."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from babydoctor.serve.page import html as show
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.errors import PageError
from babydoctor.serve.page.feedback import VERDICTS, build_row, export_session, save_row
from babydoctor.serve.page.handlers import Changes, Handlers, told, told_async
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.overlay import group_words, place_on_image, to_data_url
from babydoctor.serve.page.session import Session, Sessions


class AnswerHandlers(Handlers):
    """Handlers of a finished answer.

    Args:
        feedback_file: None: no feedback is taken.
    """

    def __init__(self, ui: Layout, sessions: Sessions, client: ControllerClient, feedback_file: Path | None) -> None:
        super().__init__(ui, sessions, client)
        self.feedback_file = feedback_file

    @told
    def on_export(self, request: gr.Request) -> Changes:
        """The session as a file, which the browser makes: nothing is written here."""
        session = self.sessions.accepted(request.session_hash)
        try:
            return {self.ui.exported: export_session(session)}
        except PageError as error:
            return {self.ui.exported: "", self.ui.status: self.sentence(error)}

    @told_async
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

    @told
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

    @told
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
