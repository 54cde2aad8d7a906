"""Handlers of the report draft."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from babydoctor.serve.page.conversation.draft import ReportDraft, as_dicom, as_html, as_text, assemble
from babydoctor.serve.page.handlers import Changes, Handlers, shows_errors
from babydoctor.serve.page.session import Session

MIME_TYPES = {"txt": "text/plain", "html": "text/html", "dcm": "application/dicom"}


class DraftHandlers(Handlers):
    """Handlers of the form. The text stays in the browser; the server keeps no draft."""

    @property
    def status(self) -> Any:
        return self.ui.report_status

    @shows_errors
    def on_assemble(self, technique: str, findings: str, impression: str, request: gr.Request) -> Changes:
        """Add all answers to the draft."""
        session = self.sessions.accepted(request.session_hash)
        draft = assemble(ReportDraft(technique, findings, impression), session)
        return {
            self.ui.technique: draft.technique,
            self.ui.findings: draft.findings,
            self.ui.impression: draft.impression,
        }

    @shows_errors
    def on_text(self, technique: str, findings: str, impression: str, request: gr.Request) -> Changes:
        draft = ReportDraft(technique, findings, impression)
        return self._save("txt", draft, lambda session: as_text(draft).encode(), request)

    @shows_errors
    def on_html(self, technique: str, findings: str, impression: str, request: gr.Request) -> Changes:
        draft = ReportDraft(technique, findings, impression)
        return self._save("html", draft, lambda session: as_html(draft, session).encode(), request)

    @shows_errors
    def on_dicom(self, technique: str, findings: str, impression: str, request: gr.Request) -> Changes:
        draft = ReportDraft(technique, findings, impression)
        return self._save("dcm", draft, lambda session: as_dicom(draft, session), request)

    def _save(self, ending: str, draft: ReportDraft, write: Callable[[Session], bytes], request: gr.Request) -> Changes:
        session = self.sessions.accepted(request.session_hash)
        draft.check()
        return self._file(ending, write(session))

    def _file(self, ending: str, data: bytes) -> Changes:
        """A file for the browser to save. Nothing is written on the server."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H-%M-%S")
        file = {
            "name": f"babydoctor-report-{now}.{ending}",
            "type": MIME_TYPES[ending],
            "data": base64.b64encode(data).decode(),
        }
        return {self.ui.report_file: json.dumps(file)}
