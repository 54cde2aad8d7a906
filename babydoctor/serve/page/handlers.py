"""What the page's groups of event handlers share.

A handler gets Gradio's session hash, finds the session, changes it, and returns how the page changes. A ``PageError``
becomes a sentence above the question box; nothing else reaches the user.
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
from babydoctor.serve.page.errors import PageError
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.session import Session, Sessions

logger = logging.getLogger(__name__)

Changes = dict[Any, Any]


class Handlers:
    """A group of handlers.

    Args:
        ui: the page's elements.
        sessions: what the page remembers of its tabs.
        client: asks the controller.
    """

    def __init__(self, ui: Layout, sessions: Sessions, client: ControllerClient) -> None:
        self.ui = ui
        self.sessions = sessions
        self.client = client

    def sentence(self, error: Exception) -> str:
        """An error as it is shown."""
        if not isinstance(error, PageError):
            log(logger, logging.ERROR, "page failed", exception=type(error).__name__, place=_place(error))
            error = PageError("internal")
        return show.status(error.sentence)

    def idle(self, session: Session) -> Changes:
        """The page while no answer runs."""
        return {
            self.ui.chat: show.messages(session),
            self.ui.send: gr.Button(visible=True),
            self.ui.stop: gr.Button(visible=False),
            self.ui.overlay: "",
            self.ui.words: "",
        }


def told(handler: Callable[..., Changes]) -> Callable[..., Changes]:
    """Show a ``PageError`` as a sentence, and any other error as one without its text."""

    @functools.wraps(handler)
    def call(self: Handlers, *args: Any) -> Changes:
        try:
            return {self.ui.status: show.status("")} | handler(self, *args)
        except Exception as error:
            return {self.ui.status: self.sentence(error)}

    return call


def told_async(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    async def call(self: Handlers, *args: Any) -> Changes:
        try:
            return {self.ui.status: show.status("")} | await handler(self, *args)
        except Exception as error:
            return {self.ui.status: self.sentence(error)}

    return call


def _place(error: Exception) -> str:
    """Where in the code it happened; the message stays out of the log, for it may quote a file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
