"""Handlers that ask the last question again: several times with random sampling, or with the image hidden."""

from __future__ import annotations

import io
from dataclasses import replace

import gradio as gr
from PIL import Image

from babydoctor.eval.certainty.agreement import NUM_SAMPLES, measure_agreement
from babydoctor.serve.page import html as show
from babydoctor.serve.page.certainty.texts import agreement_sentence, without_image_sentence
from babydoctor.serve.page.handlers import Changes, Handlers, shows_errors_async
from babydoctor.serve.page.scan import View
from babydoctor.serve.page.session import Exchange, Session
from babydoctor.serve.page.texts import PageError


class CertaintyHandlers(Handlers):
    """Handlers of ``CertaintyPanel``. Their questions and answers are not part of the conversation."""

    @shows_errors_async
    async def on_sample(self, request: gr.Request) -> Changes:
        """Sample more answers to the last question and show how many agree."""
        session = self.sessions.accepted(request.session_hash)
        exchange = session.last_answer()
        asked = _again(exchange)
        await self._ask(session, asked, NUM_SAMPLES)
        agreement = asked.certainty.get("agreement") or {}
        if "num_samples" not in agreement:
            raise PageError("cannot_sample")
        # At a temperature above 0 the displayed answer differs from the one that this request returns.
        samples = [group["text"] for group in agreement["groups"] for _ in range(group["count"])]
        agreement = measure_agreement(exchange.answer, samples)
        groups = [(group["text"], group["count"]) for group in agreement["groups"]]
        result = show.sampled_answers(exchange.question, agreement_sentence(agreement), groups)
        return self._shown(session, exchange, result)

    @shows_errors_async
    async def on_hide(self, request: gr.Request) -> Changes:
        """Ask the last question with the image hidden and show both answers."""
        session = self.sessions.accepted(request.session_hash)
        exchange = session.last_answer()
        color = await self.client.image_mean(exchange.model)
        asked = replace(_again(exchange), view=hide_image(exchange.view, color))
        await self._ask(session, asked)
        sentence = without_image_sentence(exchange.answer, asked.answer)
        result = show.answer_without_image(exchange.question, exchange.answer.strip(), asked.answer.strip(), sentence)
        return self._shown(session, exchange, result)

    async def _ask(self, session: Session, asked: Exchange, agreement: int | None = None) -> None:
        turns = Session(exchanges=session.exchanges[:-1]).turns(asked.question)
        async for _ in self.client.answer(asked, turns, agreement):
            if session.is_abandoned:
                asked.stop_requested = True

    def _shown(self, session: Session, exchange: Exchange, result: str) -> Changes:
        """The result, unless the conversation changed while it was computed."""
        return {self.ui.certainty.result: result if session.last is exchange else ""}


def hide_image(view: View, color: tuple[float, float, float]) -> View:
    """A view of the same size in one color.

    Args:
        color: red, green and blue from 0 to 1: the mean color of the model, which becomes zero for the model.
    """
    red, green, blue = (round(255 * share) for share in color)
    buffer = io.BytesIO()
    Image.new("RGB", (view.width, view.height), (red, green, blue)).save(buffer, "PNG")
    return replace(view, png=buffer.getvalue())


def _again(exchange: Exchange) -> Exchange:
    return Exchange(exchange.question, exchange.model, exchange.sampling, exchange.view)
