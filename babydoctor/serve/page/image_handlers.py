"""Handlers of the image: upload, examples, frames, window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from babydoctor.serve.page import html as show
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.examples import ExampleCase
from babydoctor.serve.page.handlers import Changes, Handlers, event_values, shows_errors
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.privacy.search import is_searched
from babydoctor.serve.page.scan import Scan, open_scan
from babydoctor.serve.page.session import Session, Sessions
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.uploads import MAX_UPLOAD_BYTES, Uploads
from babydoctor.serve.page.viewer.state import viewer_state

ROUNDING = 1e-3
"""Level and width are displayed as multiples of this."""


class ImageHandlers(Handlers):
    """Handlers of the image.

    Args:
        uploads: uploaded files that no session has taken yet.
        examples: example cases by key.
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

    @property
    def status(self) -> Any:
        return self.ui.image_status

    def load_upload(self, session: Session, values: Mapping[str, Any]) -> Changes:
        """Show an uploaded file. Raises ``PageError`` if its upload failed."""
        if "token" not in values:
            raise PageError(str(values.get("error", "upload_broken")), limit_mb=MAX_UPLOAD_BYTES // 2**20)
        return self.load(session, open_scan(self.uploads.take(str(values["token"]))))

    @shows_errors
    def on_example(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Show the example that was chosen."""
        session = self.sessions.accepted(request.session_hash)
        example = self.examples.get(str(event_values(event).get("example")))
        if example is None:
            raise PageError("bad_event")
        scan = open_scan(example.load())
        scan.title, scan.truth = example.title, example.truth
        return self.load(session, scan) | {self.ui.question: example.question}

    @shows_errors
    def on_frame(self, frame: float | None, request: gr.Request) -> Changes:
        """Show another frame of a multi-frame file."""
        session, scan = self._with_scan(request)
        wanted = 1 if frame is None else int(min(max(frame, 1), scan.num_frames))
        scan.frame = wanted - 1
        changes = self._show_view(session, scan)
        if scan.has_window:  # each frame may have its own window
            changes |= self._window_sliders(scan)
        return changes if wanted == frame else changes | {self.ui.frame: gr.Slider(value=wanted)}

    @shows_errors
    def on_preset(self, preset: str | None, request: gr.Request) -> Changes:
        """Apply the file's own window, or one of the CT presets."""
        session, scan = self._with_scan(request)
        if preset is None:  # a slider was moved before this event was sent
            return {}
        scan.center = scan.width = None
        scan.preset = preset if preset in scan.presets and preset != scan.own_window else None
        return self.show_scan(session)

    @shows_errors
    def on_window(self, center: float | None, width: float | None, request: gr.Request) -> Changes:
        """Apply a level or width that was dragged or typed. A typed value may extend the sliders."""
        session, scan = self._with_scan(request)
        if not scan.has_window:
            raise PageError("bad_window")
        if center is None or width is None:  # a box may be empty while the user types
            return {}
        at = scan.window_range()
        if abs(center - at.center) < ROUNDING and abs(width - at.width) < ROUNDING:  # a box lost focus unchanged
            return {}
        try:
            scan.set_window(center, width)
        except PageError as error:
            return self._window_sliders(scan) | {self.status: self.sentence(error)}
        at = scan.window_range()
        return self._show_view(session, scan) | {
            self.ui.preset: gr.Dropdown(value=None),
            self.ui.center: gr.Slider(minimum=at.low, maximum=at.high),
            self.ui.width: gr.Slider(maximum=at.widest),
        }

    def show_scan(self, session: Session) -> Changes:
        """The image and all its controls."""
        scan = session.scan
        if scan is None:
            return {self.ui.viewer: show.viewer(None)}
        return self.show_arranged(session) | {
            self.ui.study.list: show.study(session.study),
            self.ui.study.state: show.second(session.study),
            self.ui.facts: show.facts(scan),
            self.ui.window_group: gr.Group(visible=scan.has_window),
            self.ui.preset: gr.Dropdown(choices=scan.presets, value=_choice(scan)),
            self.ui.frame: gr.Slider(
                label=scan.noun.capitalize(),
                maximum=max(2, scan.num_frames),
                value=scan.frame + 1,
                visible=scan.num_frames > 1,
            ),
        }

    def show_arranged(self, session: Session) -> Changes:
        """The image, and the controls whose values the canvas can change."""
        scan = session.scan
        assert scan is not None
        changes = self._show_view(session, scan) | {
            self.ui.preset: gr.Dropdown(value=_choice(scan)),
            self.ui.frame: gr.Slider(value=scan.frame + 1),
        }
        return changes | self._window_sliders(scan) if scan.has_window else changes

    def _window_sliders(self, scan: Scan) -> Changes:
        at = scan.window_range()
        return {
            self.ui.center: gr.Slider(minimum=at.low, maximum=at.high, step=at.step, value=_short(at.center)),
            self.ui.width: gr.Slider(minimum=at.narrowest, maximum=at.widest, step=at.step, value=_short(at.width)),
        }

    def load(self, session: Session, scan: Scan) -> Changes:
        """Show another image, which starts a new conversation."""
        session.load(scan)
        return self.show_scan(session) | self.chat(session) | self.no_overlay() | {self.ui.status: ""}

    def _show_view(self, session: Session, scan: Scan) -> Changes:
        session.view = scan.view()
        return {
            self.ui.viewer: show.viewer(session.view, scan, viewer_state(scan, session.view)),
            self.ui.text_boxes: show.text_boxes(scan, is_searched(scan)),
        }

    def _with_scan(self, request: gr.Request) -> tuple[Session, Scan]:
        session = self.sessions.accepted(request.session_hash)
        if session.scan is None:
            raise PageError("no_image")
        return session, session.scan


def _choice(scan: Scan) -> str | None:
    """The selected entry in the list of windows; None after the sliders were moved."""
    return scan.preset or (None if scan.center is not None else scan.own_window)


def _short(value: float) -> float:
    """Rounded to six significant digits, enough for a slider in any unit."""
    return float(f"{value:.6g}")
