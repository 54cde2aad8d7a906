"""Handlers of "Where it looked": compute an occlusion map with progress, cancel it, show it for one word."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import gradio as gr

from babydoctor.serve.page import html as show
from babydoctor.serve.page.conversation.running_map import RunningMap
from babydoctor.serve.page.handlers import (
    Changes,
    Handlers,
    as_page_error,
    event_values,
    shows_errors,
    shows_errors_async,
)
from babydoctor.serve.page.overlay import group_words, place_on_image, to_data_url
from babydoctor.serve.page.session import Exchange, Session
from babydoctor.serve.page.texts import SENTENCES, PageError, localization_note

CANCELED = ("map_canceled", "map_left")
"""Codes of maps that were ended on purpose, so their sentence is not shown as an error."""

LOST = ("worker_lost", "worker_unreachable", "silent")
"""Codes whose usual sentences are about an answer, not a map."""


class LookHandlers(Handlers):
    """Handlers of the panel.

    A task of the session computes the map. Meanwhile the tab's timer calls ``on_follow``. The task and its work in the
    engine end when the user cancels it, closes the tab, asks again or loads another image.
    """

    @property
    def status(self) -> Any:
        return self.ui.look_status

    @shows_errors_async
    async def on_look(self, request: gr.Request) -> Changes:
        """Start computing the map of the last answer."""
        session = self.sessions.accepted(request.session_hash)
        exchange = session.last_answer()
        session.cancel_map("")
        session.words = []
        session.map = running = RunningMap()
        running.task = asyncio.create_task(self._compute(session, running, exchange))
        return self.shown(session) | {self.status: ""}

    @shows_errors
    def on_follow(self, request: gr.Request) -> Changes:
        """Show the progress. The last call shows the map, or why there is none."""
        session = self.sessions.accepted(request.session_hash)
        return self.shown(session)

    @shows_errors
    def on_cancel(self, request: gr.Request) -> Changes:
        """Cancel the map that is being computed."""
        session = self.sessions.accepted(request.session_hash)
        session.cancel_map("map_canceled")
        return self.shown(session)

    @shows_errors
    def on_word(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Show the map for another word of the answer."""
        session = self.sessions.accepted(request.session_hash)
        word = str(event_values(event).get("word", 0))
        if not word.isdecimal():
            raise PageError("bad_event")
        index = int(word[:9])
        if session.last is None or not 0 <= index < len(session.words):
            raise PageError("no_answer")
        return {self.ui.overlay: self._overlay(session, session.last, index)}

    def shown(self, session: Session) -> Changes:
        """The panel: the progress of a map, the map, or why there is none."""
        running = session.map
        is_running = running is not None and running.is_running
        changes: Changes = {
            self.ui.look_progress: show.map_progress(running) if running is not None and is_running else "",
            self.ui.look: gr.Button(visible=not is_running),
            self.ui.look_cancel: gr.Button(visible=is_running),
            self.ui.look_timer: gr.Timer(active=is_running),
            # A message stays until the next map. A late reply to the timer must not clear it.
            self.status: gr.skip(),
        }
        if running is not None and not is_running:
            session.map = None
            if running.problem:
                kind = "info" if running.problem in CANCELED else "error"
                changes[self.status] = show.status(PageError(running.problem).sentence, kind)
        if session.words and session.last is not None:
            buttons = show.word_buttons([word for word, _ in session.words])
            return changes | {self.ui.words: buttons, self.ui.overlay: self._overlay(session, session.last, 0)}
        return changes | {self.ui.overlay: "", self.ui.words: ""}

    async def _compute(self, session: Session, running: RunningMap, exchange: Exchange) -> None:
        try:
            reply: dict[str, Any] = {}
            async with aclosing(self.client.attention(exchange)) as messages:
                async for reply in messages:
                    if "share" in reply:
                        running.share, running.left_s = float(reply["share"]), reply.get("left_s")
            image_mode = await self.client.image_mode(exchange.model)
            words = group_words(reply["tokens"], *reply["grid"])
            if not words:
                raise PageError("no_answer")
        except asyncio.CancelledError:
            return  # ``cancel`` has stored the reason
        except Exception as error:
            code = as_page_error(error).code
            running.problem = "map_lost" if code in LOST else code if code in SENTENCES else "internal"
            return
        if session.map is running and session.last is exchange:
            session.image_mode, session.words = image_mode, words
            session.overlay_note = localization_note(reply.get("localization"))

    def _overlay(self, session: Session, exchange: Exchange, index: int) -> str:
        view = exchange.view
        word, grid = session.words[index]
        weights = place_on_image(grid, view.width, view.height, session.image_mode)
        return show.overlay(view, to_data_url(weights), word, session.overlay_note)
