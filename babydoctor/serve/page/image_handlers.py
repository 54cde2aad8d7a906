"""What happens when an image is loaded and looked at: upload, examples, frames, window."""

from __future__ import annotations

from collections.abc import Mapping

import gradio as gr

from babydoctor.serve.page import html as show
from babydoctor.serve.page.app import MAX_UPLOAD_BYTES, Uploads
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.errors import PageError
from babydoctor.serve.page.examples import ExampleCase
from babydoctor.serve.page.handlers import Changes, Handlers, told
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.scan import FILE_WINDOW, open_scan
from babydoctor.serve.page.session import Session, Sessions


class ImageHandlers(Handlers):
    """Handlers of the image.

    Args:
        uploads: files that wait to be taken.
        examples: by key.
    """

    def __init__(
        self,
        ui: Layout,
        sessions: Sessions,
        client: ControllerClient,
        uploads: Uploads,
        examples: Mapping[str, ExampleCase],
    ) -> None:
        super().__init__(ui, sessions, client)
        self.uploads = uploads
        self.examples = examples

    @told
    def on_upload(self, event: gr.EventData, request: gr.Request) -> Changes:
        """A file has come, or did not come whole."""
        session = self.sessions.accepted(request.session_hash)
        values = event._data or {}
        if "token" not in values:
            raise PageError(str(values.get("error", "upload_broken")), limit_mb=MAX_UPLOAD_BYTES // 2**20)
        return self._show_new(session, self.uploads.take(str(values["token"])), "", "", None)

    @told
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
        changes = self._show_scan(session, moves_sliders=True) | self.idle(session)
        return changes | ({self.ui.question: question} if question else {})

    @told
    def on_frame(self, frame: float, request: gr.Request) -> Changes:
        """Another frame of a multi-frame file."""
        session = self._with_scan(request)
        assert session.scan is not None
        session.scan.frame = min(max(int(frame), 1), session.scan.num_frames) - 1
        return self._show_scan(session, moves_sliders=False)

    @told
    def on_preset(self, preset: str, request: gr.Request) -> Changes:
        """The file's own window, or one of the presets for CT."""
        session = self._with_scan(request)
        assert session.scan is not None
        session.scan.center = session.scan.width = None
        session.scan.preset = preset if preset in session.scan.presets and preset != FILE_WINDOW else None
        return self._show_scan(session, moves_sliders=True)

    @told
    def on_window(self, center: float, width: float, request: gr.Request) -> Changes:
        """The sliders were moved."""
        session = self._with_scan(request)
        assert session.scan is not None
        session.scan.preset = None
        session.scan.center, session.scan.width = float(center), max(float(width), 1e-12)
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
                self.ui.center: gr.Slider(minimum=at.low, maximum=at.high, step=at.step, value=_short(at.center)),
                self.ui.width: gr.Slider(minimum=at.narrowest, maximum=at.widest, step=at.step, value=_short(at.width)),
            }
        return changes


def _short(value: float) -> float:
    """Six digits are enough for a slider, whatever the unit."""
    return float(f"{value:.6g}")
