"""Search the view for burned-in text: in the background after each change, and always before it goes to the model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable
from typing import Any

import gradio as gr

from babydoctor.imaging.burned_in import TextSearchError, find_text, is_available
from babydoctor.serve.logs import log
from babydoctor.serve.page import html as show
from babydoctor.serve.page.handlers import (
    Changes,
    Handlers,
    chosen_index,
    event_values,
    shows_errors,
    shows_errors_async,
)
from babydoctor.serve.page.scan import Scan
from babydoctor.serve.page.session import Session
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.state import viewer_state

logger = logging.getLogger(__name__)


def is_searched(scan: Scan) -> bool:
    """True if the current view was searched, or cannot be searched here."""
    return not is_available() or _key(scan) in scan.text.searched


def _key(scan: Scan) -> Hashable:
    """Key of a view. Another search is needed only if the key changes."""
    return scan.frame, scan.center, scan.width, scan.preset


def _search(scan: Scan) -> None:
    """Search the current view of a scan. A failure is kept in ``scan.text`` and not tried again for this view."""
    key, frame = _key(scan), scan.frame
    image = scan.rendered()[0]
    if _key(scan) != key:  # The view has changed meanwhile; the caller searches again.
        return
    try:
        scan.text.add(frame, find_text(image))
        scan.text.has_failed = False
    except TextSearchError:  # its text names no file
        log(logger, logging.WARNING, "search for burned-in text failed")
        scan.text.has_failed = True
    scan.text.searched.add(key)


class TextHandlers(Handlers):
    """Handlers of burned-in text."""

    @property
    def status(self) -> Any:
        return self.ui.image_status

    @shows_errors_async
    async def on_view(self, request: gr.Request) -> Changes:
        """Search after the image, frame or window has changed, or the tab was reloaded."""
        session = self.sessions.get(request.session_hash)
        if session.scan is None or is_searched(session.scan):
            return {}
        changes = await self.search(session)
        # The status line may say meanwhile that an upload failed. That message stays.
        return changes | {self.status: gr.skip()} if changes else {}

    async def search(self, session: Session) -> Changes:
        """Search the current view, unless it was searched already, and show what is hidden.

        Raises:
            PageError: the frame cannot be decoded.
        """
        changes: Changes = {}
        # The image or frame may change during a search, and a view may be rendered before the search ends.
        while (scan := session.scan) is not None:
            if not is_searched(scan):
                await asyncio.to_thread(_search, scan)
            elif session.view is not None and session.view.hidden == tuple(scan.text.hidden(scan.frame)):
                break
            changes = self._show(session)
        return changes

    @shows_errors
    def on_box(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Hide or show a text, as the user chose."""
        session = self.sessions.accepted(request.session_hash)
        scan = session.scan
        if scan is None:
            raise PageError("no_image")
        choice, boxes = str(event_values(event).get("text")), scan.text.identifying(scan.frame)
        if choice == "marks":
            scan.text.hides_marks = not scan.text.hides_marks
        else:
            scan.text.toggle(boxes[chosen_index(choice, len(boxes))])
        return self._show(session)

    def _show(self, session: Session) -> Changes:
        if session.scan is None:
            return {}
        session.view = session.scan.view()
        return {
            self.ui.viewer: show.viewer(session.view, session.scan, viewer_state(session.scan, session.view)),
            self.ui.text_boxes: show.text_boxes(session.scan, is_searched(session.scan)),
        }
