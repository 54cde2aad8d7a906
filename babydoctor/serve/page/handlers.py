"""The base of all groups of event handlers.

A handler gets Gradio's session hash, finds the session, changes it, and returns updates of the components. A
``PageError`` becomes a sentence in the web UI. Users see no other details of an error.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from babydoctor.serve.logs import log
from babydoctor.serve.page import html as show
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.session import Session, Sessions
from babydoctor.serve.page.texts import PageError

logger = logging.getLogger(__name__)

Changes = dict[Any, Any]


class Handlers:
    """A group of handlers.

    Args:
        ui: the components.
        sessions: all tabs.
        client: client of the controller.
    """

    def __init__(self, ui: Layout, sessions: Sessions, client: ControllerClient) -> None:
        self.ui = ui
        self.sessions = sessions
        self.client = client

    @property
    def status(self) -> Any:
        """The component that shows this group's errors."""
        return self.ui.status

    def sentence(self, error: Exception) -> str:
        """An error as HTML. An unexpected error is logged and shown without its text."""
        return show.status(as_page_error(error).sentence)

    def chat(self, session: Session) -> Changes:
        """The conversation and its buttons, with or without a running answer."""
        is_answering = session.is_answering
        return {
            self.ui.chat: show.chat(session),
            self.ui.turn_note: show.turn_note(session),
            self.ui.send: gr.Button(visible=not is_answering),
            self.ui.stop: gr.Button(visible=is_answering),
            self.ui.follow: gr.Timer(active=is_answering),
        }

    def no_overlay(self) -> Changes:
        """Clear "Where it looked" and "How sure is it?"."""
        return {self.ui.overlay: "", self.ui.words: "", self.ui.look_status: "", self.ui.certainty.result: ""}


def event_values(event: gr.EventData) -> dict[str, Any]:
    """The data that ``page.js`` sends with an event; empty if it is not an object."""
    return event._data if isinstance(event._data, dict) else {}


def chosen_index(value: Any, count: int) -> int:
    """The index that a pressed button sends.

    Raises:
        PageError: no item has this index.
    """
    text = str(value)
    if len(text) > 9 or not text.isdecimal() or int(text) >= count:
        raise PageError("bad_event")
    return int(text)


def as_page_error(error: Exception) -> PageError:
    """The error itself, or ``internal`` for an unexpected error, which is logged."""
    if isinstance(error, PageError):
        return error
    log(logger, logging.ERROR, "web UI handler failed", exception=type(error).__name__, place=_place(error))
    return PageError("internal")


def shows_errors(handler: Callable[..., Changes]) -> Callable[..., Changes]:
    """Show the error of a handler in the group's status line. A handler that changed something clears the line."""

    @functools.wraps(handler)
    def call(self: Handlers, *args: Any) -> Changes:
        try:
            changes = handler(self, *args)
            return {self.status: ""} | changes if changes else {self.status: gr.skip()}
        except Exception as error:
            return {self.status: self.sentence(error)}

    return call


def shows_errors_async(handler: Callable[..., Any]) -> Callable[..., Any]:
    """``shows_errors`` for a coroutine."""

    @functools.wraps(handler)
    async def call(self: Handlers, *args: Any) -> Changes:
        try:
            changes = await handler(self, *args)
            return {self.status: ""} | changes if changes else {self.status: gr.skip()}
        except Exception as error:
            return {self.status: self.sentence(error)}

    return call


def _place(error: Exception) -> str:
    """File and line of the error. Its message stays out of the log, because it may quote a file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
