"""Handlers of the PACS: search, pick a series, store an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from babydoctor.schema import UserError
from babydoctor.serve.page import html as show
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.handlers import Changes, Handlers, chosen_index, event_values, shows_errors
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.pacs.client import PacsClient, StudyQuery
from babydoctor.serve.page.session import Session, Sessions
from babydoctor.serve.page.study.pacs_files import PacsFiles
from babydoctor.serve.page.study.uploads import StudyUploads
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.settings import DicomWebServer


class PacsHandlers(Handlers):
    """Handlers of the PACS. Patient identifiers appear only in the picker.

    Args:
        uploads: receives the series to fetch.
        servers: the PACS of ``page.dicomweb``.
    """

    def __init__(
        self,
        ui: Layout,
        sessions: Sessions,
        client: ControllerClient,
        uploads: StudyUploads,
        servers: Sequence[DicomWebServer],
    ) -> None:
        super().__init__(ui, sessions, client)
        self.uploads = uploads
        self.pacs = {server.name: PacsClient(server) for server in servers}

    @property
    def status(self) -> Any:
        return self.ui.pacs.status

    @shows_errors
    def on_search(self, server: str, patient: str, accession: str, date: str, request: gr.Request) -> Changes:
        """Search for studies."""
        session = self.sessions.accepted(request.session_hash)
        if server not in self.pacs:
            raise PageError("bad_event")
        picker = session.pacs
        picker.client = self.pacs[server]
        picker.forget_patients()
        picker.studies = picker.client.search(StudyQuery(patient or "", accession or "", date or ""))
        return {self.ui.pacs.results: show.pacs_studies(picker.studies)}

    @shows_errors
    def on_pick(self, keep: bool, event: gr.EventData, request: gr.Request) -> Changes:
        """Handle the choice of a study or a series. The tab then requests the series by a ticket and shows progress.

        Args:
            keep: keep the loaded series, and open the chosen one beside them.
        """
        session = self.sessions.accepted(request.session_hash)
        picker, values = session.pacs, event_values(event)
        if picker.client is None:
            raise PageError("session_lost")
        if "back" in values:
            return {self.ui.pacs.results: show.pacs_studies(picker.studies)}
        if "study" in values:
            picker.series = picker.client.series(picker.studies[chosen_index(values["study"], len(picker.studies))])
            return {self.ui.pacs.results: show.pacs_series(picker.series)}
        series = picker.series[chosen_index(values.get("series"), len(picker.series))]
        instances = picker.client.instances(series)
        if not instances:
            raise PageError("pacs_no_images")
        kept = _files_to_keep(session, picker.client) if keep is True else ()
        source = PacsFiles(picker.client, instances, max(series.num_instances, len(instances)), kept)
        picker.forget_patients()
        panel = self.ui.pacs
        emptied = {panel.results: "", panel.patient: "", panel.accession: "", panel.keep: False}
        return emptied | {panel.ticket: self.uploads.sources.put(source), panel.form: gr.Accordion(open=False)}


def _files_to_keep(session: Session, client: PacsClient) -> list[bytes]:
    """The files of the loaded study.

    Raises:
        PageError: they did not come from this PACS, so no answer about them may be stored there.
    """
    if session.study is None or session.study.origin is not client:
        raise PageError("pacs_cannot_keep")
    return [file.data for series in session.study.series for file in series.stack.files]


class StoreHandlers(Handlers):
    """Handler of the form that stores an answer."""

    @property
    def status(self) -> Any:
        return self.ui.store.status

    @shows_errors
    def on_store(self, agree: bool, request: gr.Request) -> Changes:
        """Store the last answer as a structured report in the PACS that the image came from."""
        from babydoctor.serve.page.pacs.report import build_report

        session = self.sessions.accepted(request.session_hash)
        scan, last = session.scan, session.last
        client = session.study.origin if session.study is not None else None
        if scan is None or scan.dicom is None or client is None:
            raise PageError("pacs_not_from_here")
        if not client.server.write_back:
            raise PageError("pacs_read_only")
        if agree is not True:
            raise PageError("no_consent")
        if last is None or not last.answer or session.is_answering:
            raise PageError("no_answer")
        try:
            dicom, frame = scan.source()
            report = build_report(
                dicom.dataset,
                question=last.question,
                answer=last.answer.strip(),
                model=last.model,
                view=last.view.caption or "as stored",
                frame=frame,
            )
        except UserError:  # the error's text may quote the file
            raise PageError("pacs_no_report") from None
        client.store(report)
        note = f"Stored in {client.server.name} as a research report, marked “not for clinical use”."
        return {self.ui.store.agree: False, self.status: show.status(note, "info")}
