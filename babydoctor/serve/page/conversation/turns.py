"""Handlers of the buttons at each question and answer: edit and ask again, delete, undo, add to the report."""

from __future__ import annotations

import gradio as gr

from babydoctor.serve.page.conversation.draft import add_answer
from babydoctor.serve.page.handlers import Changes, Handlers, chosen_index, event_values, shows_errors
from babydoctor.serve.page.session import Session
from babydoctor.serve.page.texts import PageError


class TurnHandlers(Handlers):
    """Handlers of individual turns of the conversation."""

    @shows_errors
    def on_turn(
        self, question: str, findings: str, impression: str, event: gr.EventData, request: gr.Request
    ) -> Changes:
        """Handle the press of a button at a question or an answer."""
        session = self.sessions.accepted(request.session_hash)
        values = event_values(event)
        if session.is_answering:
            raise PageError("still_answering")
        if "edit" in values:
            index = chosen_index(values["edit"], len(session.exchanges))
            if session.editing is None:
                session.draft = question or ""
            session.editing = index
            return {self.ui.question: session.exchanges[index].question} | self.chat(session)
        if "delete" in values:
            return self._delete(session, chosen_index(values["delete"], len(session.exchanges)), question)
        sections = {"findings": (self.ui.findings, findings), "impression": (self.ui.impression, impression)}
        for name, (box, text) in sections.items():
            if name in values:
                exchange = session.exchanges[chosen_index(values[name], len(session.exchanges))]
                return {box: add_answer(text, exchange), self.ui.report_panel: gr.Accordion(open=True)}
        raise PageError("bad_event")

    @shows_errors
    def on_note(self, question: str, event: gr.EventData, request: gr.Request) -> Changes:
        """Undo the last change, or cancel the edit of a question."""
        session = self.sessions.accepted(request.session_hash)
        if "undo" in event_values(event) and session.earlier is not None and not session.is_answering:
            session.exchanges = session.earlier
            session.forget_earlier()
            return self.chat(session) | self._forget_map(session)
        return self._stop_editing(session, question) | self.chat(session)

    def _delete(self, session: Session, index: int, question: str) -> Changes:
        is_last = index == len(session.exchanges) - 1
        changes = self._stop_editing(session, question)
        session.keep_earlier(f"Question {index + 1} and its answer were deleted.")
        session.exchanges = [each for number, each in enumerate(session.exchanges) if number != index]
        return changes | self.chat(session) | (self._forget_map(session) if is_last else {})

    def _stop_editing(self, session: Session, question: str) -> Changes:
        """Cancel the edit. The text from before the edit comes back into the box."""
        if session.editing is None:
            return {}
        session.editing = None
        return {self.ui.question: session.draft}

    def _forget_map(self, session: Session) -> Changes:
        """Clear the map, because it belongs to another answer."""
        session.cancel_map("")
        session.words = []
        return self.no_overlay()
