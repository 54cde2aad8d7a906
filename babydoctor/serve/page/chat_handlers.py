"""Handlers of the conversation and of a finished answer: ask, stop, feedback, export."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import gradio as gr

from babydoctor.schema import IMAGE_TOKEN
from babydoctor.serve.api.protocol import MAX_NEW_TOKENS
from babydoctor.serve.page import html as show
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.feedback import VERDICTS, build_row, export_session, save_row
from babydoctor.serve.page.handlers import (
    Changes,
    Handlers,
    as_page_error,
    event_values,
    shows_errors,
    shows_errors_async,
)
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.privacy.search import TextHandlers
from babydoctor.serve.page.session import AnswerSettings, Exchange, Session, Sessions
from babydoctor.serve.page.texts import PageError

Number = float | None
"""Value of a number box, which may be empty."""


class ConversationHandlers(Handlers):
    """Handlers of the conversation.

    A task of the session receives the answer, so an answer survives a reload or a broken connection. The tab's timer
    calls ``on_follow`` while an answer arrives.

    Args:
        text: hides burned-in text before the image is sent to a model.
    """

    def __init__(self, ui: Layout, sessions: Sessions, client: ControllerClient, text: TextHandlers) -> None:
        super().__init__(ui, sessions, client)
        self.text = text

    @shows_errors_async
    async def on_ask(
        self, question: str, model: str, temperature: Number, top_p: Number, max_tokens: Number, request: gr.Request
    ) -> Changes:
        """Start answering a question."""
        session = self.sessions.accepted(request.session_hash)
        sampling = _sampling(temperature, top_p, max_tokens)
        self._check(session, question, model, sampling)
        hidden = await self.text.search(session)
        exchange = self._check(session, question, model, sampling)
        index, box = session.editing, ""
        if index is not None:
            # The edited question replaces the old one and all later exchanges. The earlier draft comes back.
            session.editing, box = None, session.draft
        return self._start(session, exchange, index) | {self.ui.question: box} | hidden

    @shows_errors_async
    async def on_again(
        self, model: str, temperature: Number, top_p: Number, max_tokens: Number, request: gr.Request
    ) -> Changes:
        """Ask the last question once more, with the current image and settings."""
        session = self.sessions.accepted(request.session_hash)
        last = session.last
        if last is None:
            raise PageError("no_answer")
        hidden = await self.text.search(session)
        exchange = self._check(session, last.question, model, _sampling(temperature, top_p, max_tokens))
        return self._start(session, exchange, len(session.exchanges) - 1) | hidden

    async def on_follow(self, question: str, request: gr.Request) -> Changes:
        """The answer so far; the last call also shows how it ended."""
        try:
            session = self.sessions.accepted(request.session_hash)
        except PageError as error:
            return {self.ui.status: self.sentence(error), self.ui.follow: gr.Timer(active=False)}
        return {self.ui.chat: show.chat(session)} if session.is_answering else self.finished(session, question)

    def finished(self, session: Session, question: str) -> Changes:
        """The conversation without a running answer.

        If a question got no answer, the exchanges that it should have replaced come back, and its text goes back into
        the question box, if that is empty. After an answer that broke off, "Undo" brings back the replaced one.
        """
        changes: Changes = {}
        last = session.last
        if last is not None and last.ended and last.shown_s is None:
            last.shown_s = time.monotonic()
        replaced, session.replaced = session.replaced, []
        if session.problem:
            error = PageError(session.problem, retry_after_s=session.problem_retry_s)
            changes[self.ui.status] = self.sentence(error)
            if last is not None and not last.answer:
                session.exchanges.pop()
                session.exchanges += replaced
                is_again = bool(replaced) and replaced[0].question == last.question
                if (question or "").strip():
                    session.exchanges.append(last)
                elif not is_again:
                    changes[self.ui.question] = last.question
                replaced = []
            session.problem = ""
        if replaced and last is not None and (last.ended in ("error", "stopped") or len(replaced) > 1):
            session.earlier = [*session.exchanges[:-1], *replaced]
            session.undo_note = "The old answer was replaced."
        return self.chat(session) | changes

    async def on_stop(self, request: gr.Request) -> Changes:
        """Request the running answer to stop. The next ``on_follow`` shows the partial answer."""
        try:
            self.sessions.get(request.session_hash).stop()
        except PageError as error:
            return {self.ui.status: self.sentence(error)}
        return {self.ui.stop: gr.Button(visible=False)}

    @shows_errors
    def on_clear(self, request: gr.Request) -> Changes:
        """Start a new conversation about the same image."""
        session = self.sessions.accepted(request.session_hash)
        earlier = list(session.exchanges) if not session.is_answering else []
        session.start_over()
        if earlier:
            session.earlier, session.undo_note = earlier, "The conversation was cleared."
        return self.chat(session) | self.no_overlay()

    def on_starter(self, event: gr.EventData) -> str:
        """Ask the suggested question that was chosen."""
        return str(event_values(event).get("question", ""))

    def _check(self, session: Session, question: str, model: str, sampling: AnswerSettings) -> Exchange:
        question = (question or "").strip()
        if session.view is None:
            raise PageError("no_image")
        if not question:
            raise PageError("no_question")
        if IMAGE_TOKEN in question:
            raise PageError("image_in_question")
        if not model:
            raise PageError("no_model")
        if session.is_answering:
            raise PageError("still_answering")
        return Exchange(question, model, sampling, session.view, session.image_name)

    def _start(self, session: Session, exchange: Exchange, index: int | None = None) -> Changes:
        """Start answering. ``index``: the question replaces this exchange and all later ones."""
        session.cancel_map("")
        session.forget_earlier()
        if index is not None:
            session.exchanges, session.replaced = session.exchanges[:index], session.exchanges[index:]
        turns = session.turns(exchange.question)
        session.exchanges.append(exchange)
        session.words = []
        session.problem = ""

        async def write() -> None:
            try:
                async for _ in self.client.answer(exchange, turns):
                    if session.is_abandoned:
                        exchange.stop_requested = True
            except Exception as error:
                shown = as_page_error(error)
                if exchange in session.exchanges:
                    session.problem, session.problem_retry_s = shown.code, shown.retry_after_s
                exchange.ended = "error"
            finally:
                exchange.ended = exchange.ended or "stopped"

        session.task = asyncio.create_task(write())
        return self.chat(session) | self.no_overlay()


class AnswerHandlers(Handlers):
    """Handlers of a finished answer.

    Args:
        feedback_file: None: no feedback form.
    """

    def __init__(self, ui: Layout, sessions: Sessions, client: ControllerClient, feedback_file: Path | None) -> None:
        super().__init__(ui, sessions, client)
        self.feedback_file = feedback_file

    @shows_errors
    def on_export(self, request: gr.Request) -> Changes:
        """The session as a file for the browser to save. Nothing is written on the server."""
        session = self.sessions.accepted(request.session_hash)
        try:
            return {self.ui.exported: export_session(session)}
        except PageError as error:
            return {self.ui.exported: "", self.ui.status: self.sentence(error)}

    @shows_errors
    def on_save(
        self,
        verdict: str | None,
        errors: list[str],
        comment: str,
        consent: bool,
        with_image: bool,
        request: gr.Request,
    ) -> Changes:
        """Save feedback, if the user consents."""
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


def _sampling(temperature: Number, top_p: Number, max_tokens: Number) -> AnswerSettings:
    """The settings, clamped to their limits. An empty box counts as its default."""
    return AnswerSettings(
        temperature=min(max(temperature if temperature is not None else 0.0, 0.0), 2.0),
        top_p=min(max(top_p if top_p is not None else 1.0, 0.05), 1.0),
        max_new_tokens=int(min(max(max_tokens if max_tokens is not None else 256, 16), MAX_NEW_TOKENS)),
    )
