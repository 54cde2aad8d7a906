"""The web UI's components for a study: the list of its series, and the second viewport."""

from __future__ import annotations

import gradio as gr

from babydoctor.serve.page import html as show


class StudyPanel:
    """The list of series and the second viewport. Create it inside ``gr.Blocks``.

    Args:
        buttons: JavaScript that reports pressed buttons of a ``gr.HTML``.
    """

    def __init__(self, buttons: str) -> None:
        self.list = gr.HTML("", js_on_load=buttons, elem_id="bd-study", apply_default_css=False, min_width=200)

    def build_second(self, second_viewer: str) -> None:
        """Create the second viewport.

        Args:
            second_viewer: JavaScript that initializes it.
        """
        self.canvas = gr.HTML(
            show.canvas(is_second=True),
            js_on_load=second_viewer,
            elem_id="bd-second-canvas",
            apply_default_css=False,
            min_width=200,
        )
        self.state = gr.HTML("", elem_id="bd-second", apply_default_css=False)
