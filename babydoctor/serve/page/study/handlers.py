"""Handlers of a study: open it, choose a series, compare two series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from babydoctor.serve.page import html as show
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.handlers import Changes, Handlers, chosen_index, event_values, shows_errors
from babydoctor.serve.page.image_handlers import ImageHandlers
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.session import Session, Sessions
from babydoctor.serve.page.study.study import Study
from babydoctor.serve.page.study.uploads import StudyUploads
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.state import take_state


class StudyHandlers(Handlers):
    """Handlers of a study.

    Args:
        images: shows a series.
        uploads: uploaded studies that no session has taken yet.
    """

    def __init__(
        self, ui: Layout, sessions: Sessions, client: ControllerClient, images: ImageHandlers, uploads: StudyUploads
    ) -> None:
        super().__init__(ui, sessions, client)
        self.images = images
        self.uploads = uploads

    @property
    def status(self) -> Any:
        return self.ui.image_status

    @shows_errors
    def on_upload(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Show an uploaded file or study, or why its upload failed."""
        session = self.sessions.accepted(request.session_hash)
        values = event_values(event)
        if "study" not in values:
            return self.images.load_upload(session, values)
        return self._open(session, self.uploads.studies.take(str(values["study"])))

    @shows_errors
    def on_choose(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Show the chosen series, for the model or in the second viewport."""
        session = self.sessions.accepted(request.session_hash)
        values = event_values(event)
        study = _study(session)
        if "compare" in values:
            study.second = chosen_index(values["compare"], len(study.series))
            return self._show_list(session)
        return self._show(session, study, chosen_index(values.get("series"), len(study.series)))

    @shows_errors
    def on_second(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Close the second viewport, or give its series to the model instead of the first one."""
        session = self.sessions.accepted(request.session_hash)
        study, values = _study(session), event_values(event)
        if study.second is None:
            return {}
        if values.get("do") == "swap":
            scan = study.series[study.second].scan
            shown = values.get("state")
            if not isinstance(shown, Mapping):
                raise PageError("bad_event")
            take_state(scan, shown)
            return self._show(session, study, study.second)
        study.second = None
        return self._show_list(session)

    def _open(self, session: Session, study: Study) -> Changes:
        before = session.study
        if study.extends_loaded and before is not None and study.keep_shown(before):
            session.study = study
            return self.images.show_scan(session)  # the conversation is about the same image
        changes = self.images.load(session, study.series[study.shown].scan)
        session.study = study
        return changes | self._show_list(session)

    def _show(self, session: Session, study: Study, index: int) -> Changes:
        """Show a series. A series of the same examination keeps the conversation; any other one starts a new one."""
        before = study.shown
        if study.second == index:
            study.second = before
        study.shown = index
        session.scan = study.series[index].scan
        changes: Changes = {}
        if not study.is_same_examination(before, index):
            session.start_over()
            changes = self.chat(session) | self.no_overlay() | {self.ui.status: ""}
        return self.images.show_scan(session) | changes

    def _show_list(self, session: Session) -> Changes:
        return {self.ui.study.list: show.study(session.study), self.ui.study.state: show.second(session.study)}


def _study(session: Session) -> Study:
    if session.study is None:
        raise PageError("no_image")
    return session.study
