"""The page's layout: which components there are, what they are called and in which order the keyboard reaches them."""

from __future__ import annotations

import gradio as gr

from babydoctor.serve.api.protocol import MAX_NEW_TOKENS
from babydoctor.serve.page import html as show
from babydoctor.serve.page.app import MAX_UPLOAD_BYTES
from babydoctor.serve.page.feedback import ERROR_KINDS, VERDICTS
from babydoctor.serve.page.scan import FILE_WINDOW
from babydoctor.serve.page.style import BUTTONS_SCRIPT, DROP_HTML, DROP_SCRIPT, GATE_TEXT, OVERLAY_NOTE

REFRESH_S = 15
"""How often an open page asks which models there are."""


class Layout:
    """The components, by name. Made inside ``gr.Blocks``; what they do is connected by ``web_page.Page``.

    Args:
        gallery: the example cases as HTML.
        takes_feedback: whether there is a place to save it.
    """

    def __init__(self, gallery: str, takes_feedback: bool) -> None:
        self.passed = gr.BrowserState(False, storage_key="babydoctor-research-use", secret="not a secret")
        self.timer = gr.Timer(REFRESH_S)
        _html(show.BANNER, "bd-banner")
        with gr.Row(elem_id="bd-header"):
            _html(show.TITLE, "bd-title")
            self.model = gr.Dropdown([], label="Model", elem_id="bd-model", scale=0, min_width=260, visible=False)
            self.theme = gr.Button("Light / dark", size="sm", scale=0, min_width=110, elem_id="bd-theme")
        self._build_gate()
        with gr.Row(visible=False, elem_id="bd-main", equal_height=False) as self.main:
            with gr.Column(scale=5, min_width=340):
                self._build_image(gallery)
            with gr.Column(scale=6, min_width=340):
                self._build_chat()
                self._build_look_and_settings()
                self._build_feedback(takes_feedback)

    def _build_gate(self) -> None:
        with gr.Column(elem_id="bd-gate", visible=True) as self.gate:
            gr.Markdown(GATE_TEXT)
            self.agree = gr.Checkbox(False, label="I have read this and will use BabyDoctor for research only")
            self.enter = gr.Button("Continue", variant="primary", interactive=False, elem_id="bd-enter")

    def _build_image(self, gallery: str) -> None:
        script = DROP_SCRIPT.replace("MAX_BYTES", str(MAX_UPLOAD_BYTES))
        self.drop = _html(DROP_HTML, "bd-drop", script)
        self.gallery = _html(gallery, "bd-gallery", BUTTONS_SCRIPT)
        self.viewer = _html(show.viewer(None), "bd-viewer")
        with gr.Group(visible=False, elem_id="bd-window") as self.window_group:
            self.preset = gr.Dropdown([FILE_WINDOW], value=FILE_WINDOW, label="Window", elem_id="bd-preset")
            with gr.Row():
                self.center = gr.Slider(
                    -1024, 3071, 40, step=1, label="Level", elem_id="bd-center", min_width=150, buttons=[]
                )
                self.width = gr.Slider(
                    1, 4096, 400, step=1, label="Width", elem_id="bd-width", min_width=150, buttons=[]
                )
        self.frame = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False, elem_id="bd-frame", buttons=[])
        self.facts = _html("", "bd-facts")

    def _build_chat(self) -> None:
        self.chat = gr.Chatbot(
            [],
            label="Conversation",
            show_label=False,  # on a phone it would lie over the first message
            elem_id="bd-chat",
            height=360,
            layout="bubble",
            render_markdown=False,
            latex_delimiters=[],
            allow_tags=False,
            feedback_options=None,
            buttons=["copy"],
            group_consecutive_messages=False,
            placeholder="Load an image, then ask about it.",
        )
        self.status = _html("", "bd-status")
        self.starters = _html(show.chips(show.QUESTIONS, "question"), "bd-starters", BUTTONS_SCRIPT)
        with gr.Row(elem_id="bd-ask"):
            self.question = gr.Textbox(
                label="Question",
                placeholder="Ask about the image; Enter sends",
                lines=1,
                max_lines=6,
                max_length=8000,
                scale=5,
                min_width=200,
                elem_id="bd-question",
            )
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="bd-send")
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="bd-stop")
        with gr.Row():
            self.again = gr.Button("Regenerate", size="sm", min_width=96, elem_id="bd-again")
            self.clear = gr.Button("Clear chat", size="sm", min_width=96, elem_id="bd-clear")
            self.export = gr.Button("Export session", size="sm", min_width=110, elem_id="bd-export")
        self.exported = gr.Textbox(visible=False)

    def _build_look_and_settings(self) -> None:
        with gr.Accordion("Where it looked", open=False, elem_id="bd-look-panel"):
            self.look = gr.Button("Show for the last answer", size="sm", elem_id="bd-look")
            self.overlay = _html("", "bd-overlay")
            self.words = _html("", "bd-words", BUTTONS_SCRIPT)
            gr.Markdown(OVERLAY_NOTE, elem_classes="bd-note")
        with gr.Accordion("Settings", open=False, elem_id="bd-settings"):
            self.temperature = gr.Slider(
                0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest words, the same answer every time"
            )
            self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="smaller: fewer unlikely words")
            self.max_tokens = gr.Slider(
                16, MAX_NEW_TOKENS, 256, step=16, label="Longest answer, in tokens", info="about ¾ of a word each"
            )

    def _build_feedback(self, takes_feedback: bool) -> None:
        with gr.Accordion("Feedback on the last answer", open=False, elem_id="bd-feedback", visible=takes_feedback):
            self.verdict = gr.Radio(
                [(text, key) for key, text in VERDICTS.items()], label="How was the answer?", elem_id="bd-verdict"
            )
            self.errors = gr.CheckboxGroup(
                [(text, kind) for kind, text in ERROR_KINDS.items()], label="What was wrong?", elem_id="bd-errors"
            )
            self.comment = gr.Textbox(
                label="Comment", lines=2, max_length=4000, info="no names, please", elem_id="bd-comment"
            )
            self.consent = gr.Checkbox(
                False, label="Save my feedback with this question and answer on the server", elem_id="bd-consent"
            )
            self.with_image = gr.Checkbox(False, label="Save the image, too", elem_id="bd-with-image")
            self.save = gr.Button("Save feedback", size="sm", elem_id="bd-save")
            self.saved = _html("", "bd-saved")


def _html(value: str, elem_id: str, script: str | None = None) -> gr.HTML:
    """A piece of HTML in our own style."""
    return gr.HTML(value, js_on_load=script, elem_id=elem_id, apply_default_css=False, min_width=200)
