"""The web UI's components for a PACS."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from babydoctor.serve.settings import DicomWebServer


class PacsPanel:
    """Search form, results and the ticket of a chosen series. All are hidden if no PACS is configured.

    Create it inside ``gr.Blocks``.

    Args:
        servers: the PACS to choose from.
        buttons: JavaScript that reports pressed buttons of a ``gr.HTML``.
    """

    def __init__(self, servers: Sequence[DicomWebServer], buttons: str) -> None:
        names = [server.name for server in servers]
        with gr.Accordion("Load from a PACS", open=False, visible=bool(servers), elem_id="bd-pacs") as self.form:
            self.server = gr.Dropdown(names, value=names[0] if names else None, label="PACS", visible=len(names) > 1)
            with gr.Row():
                self.patient = gr.Textbox(label="Patient ID", max_length=64, min_width=120)
                self.accession = gr.Textbox(label="Accession no.", max_length=64, min_width=120)
                self.date = gr.Textbox(label="Study date", max_length=32, min_width=120, placeholder="2024-05-31")
            self.keep = gr.Checkbox(
                False, label="Keep the loaded series and open the new one beside it", elem_id="bd-pacs-keep"
            )
            self.search = gr.Button("Search", size="sm", elem_id="bd-pacs-search")
            self.status = gr.HTML("", elem_id="bd-pacs-status", apply_default_css=False)
            self.results = gr.HTML("", js_on_load=buttons, elem_id="bd-pacs-results", apply_default_css=False)
        self.ticket = gr.Textbox(visible=False)


class StorePanel:
    """The form that stores the last answer in the PACS that the image came from."""

    def __init__(self, servers: Sequence[DicomWebServer]) -> None:
        is_visible = any(server.write_back for server in servers)
        with gr.Accordion("Store the last answer in the PACS", open=False, visible=is_visible, elem_id="bd-pacs-store"):
            self.agree = gr.Checkbox(
                False, label="Store question and answer as a research report, marked “not for clinical use”"
            )
            self.store = gr.Button("Store", size="sm")
            self.status = gr.HTML("", elem_id="bd-pacs-stored", apply_default_css=False)
