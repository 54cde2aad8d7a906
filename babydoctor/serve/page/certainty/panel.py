"""The components below the conversation that ask the last question again."""

from __future__ import annotations

import gradio as gr

from babydoctor.eval.certainty.agreement import NUM_SAMPLES
from babydoctor.serve.page.certainty.texts import PANEL_NOTE


class CertaintyPanel:
    """Two buttons and their results. Create it inside ``gr.Blocks``."""

    def __init__(self) -> None:
        with gr.Accordion("How sure is it?", open=False, elem_id="bd-certainty-panel"):
            with gr.Row():
                self.sample = gr.Button(f"Ask {NUM_SAMPLES} more times", size="sm", min_width=130, elem_id="bd-sample")
                self.hide = gr.Button("Ask without the image", size="sm", min_width=130, elem_id="bd-hide")
            self.result = gr.HTML("", elem_id="bd-certainty", apply_default_css=False)
            gr.Markdown(PANEL_NOTE, elem_classes="bd-note")
