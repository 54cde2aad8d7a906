"""The handler of the viewer's canvas."""

from __future__ import annotations

from typing import Any

import gradio as gr

from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.handlers import Changes, Handlers, event_values, shows_errors
from babydoctor.serve.page.image_handlers import ImageHandlers
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.session import Sessions
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.state import take_state


class ViewerHandlers(Handlers):
    """The handler of the viewer's canvas.

    Args:
        images: shows the image that the model receives, and the controls.
    """

    def __init__(self, ui: Layout, sessions: Sessions, client: ControllerClient, images: ImageHandlers) -> None:
        super().__init__(ui, sessions, client)
        self.images = images

    @property
    def status(self) -> Any:
        return self.ui.image_status

    @shows_errors
    def on_arrange(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Apply a change of the frame, window, region, inversion or rotation on the canvas."""
        session = self.sessions.accepted(request.session_hash)
        scan, values = session.scan, event_values(event)
        if scan is None or values.get("key") != scan.key:  # the image was replaced meanwhile
            return {}
        try:
            take_state(scan, values)
        except PageError as error:  # the canvas returns to the server's state
            return self.images.show_arranged(session) | {self.status: self.sentence(error)}
        return self.images.show_arranged(session)
