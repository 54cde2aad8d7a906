"""What happens when a question is asked, stopped, asked again or forgotten."""

from __future__ import annotations

from collections.abc import AsyncIterator

import gradio as gr

from babydoctor.schema import IMAGE_TOKEN
from babydoctor.serve.page import html as show
from babydoctor.serve.page.errors import PageError
from babydoctor.serve.page.handlers import Changes, Handlers, told
from babydoctor.serve.page.session import Exchange, Sampling, Session


class ConversationHandlers(Handlers):
    """Handlers of the conversation."""

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
        changes = self.idle(session) | {self.ui.status: problem}
        if problem and not exchange.answer and exchange in session.exchanges:
            # Nothing came: the question goes back into its box, to be sent again.
            session.exchanges.remove(exchange)
            changes |= self.idle(session) | {self.ui.question: exchange.question, self.ui.status: problem}
        yield changes

    async def on_stop(self, request: gr.Request) -> Changes:
        """Ask the running answer to end; its own handler then shows what there is."""
        self.sessions.get(request.session_hash).stop()
        return {self.ui.stop: gr.Button(visible=False)}

    @told
    def on_clear(self, request: gr.Request) -> Changes:
        """A new conversation about the same image."""
        session = self.sessions.accepted(request.session_hash)
        session.start_over()
        return self.idle(session)

    def on_starter(self, event: gr.EventData) -> str:
        """One of the ready-made questions."""
        return str((event._data or {}).get("question", ""))
