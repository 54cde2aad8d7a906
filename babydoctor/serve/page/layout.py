"""Layout of the web UI: the components, their labels and the order in which the keyboard reaches them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from babydoctor.serve.api.protocol import MAX_NEW_TOKENS
from babydoctor.serve.page import html as show
from babydoctor.serve.page.certainty.panel import CertaintyPanel
from babydoctor.serve.page.conversation.draft import MAX_SECTION_CHARS
from babydoctor.serve.page.examples import ExampleCase
from babydoctor.serve.page.feedback import ERROR_KINDS, VERDICTS
from babydoctor.serve.page.pacs.panel import PacsPanel, StorePanel
from babydoctor.serve.page.scan import FILE_WINDOW
from babydoctor.serve.page.session import KEEP_MIN
from babydoctor.serve.page.study.archive import MAX_STUDY_BYTES
from babydoctor.serve.page.study.panel import StudyPanel
from babydoctor.serve.page.texts import GATE_TEXT, OVERLAY_NOTE, QUESTIONS, REPORT_NOTE
from babydoctor.serve.page.uploads import MAX_UPLOAD_BYTES
from babydoctor.serve.settings import DicomWebServer

REFRESH_S = 5
"""How often an open tab polls the list of running models."""

BUTTONS = "buttons(element, trigger)"

KEPT = "bd-kept"
"""CSS class of a text box whose content the browser keeps while the user types, see ``keepTyped``."""

FOLLOW_S = 0.25
"""How often an open tab polls a running answer."""


def script(call: str, arguments: str = "", file: str = "page.js") -> str:
    """JavaScript that calls a function of a file in ``static/``.

    Args:
        call: for example ``dropZone(element, trigger)``.
        arguments: parameter names, for a function for Gradio's ``js=``. Empty: a statement for ``js_on_load``.
    """
    load = f"import(new URL('page/static/{file}', document.baseURI)).then((page) => page.{call})"
    return f"({arguments}) => {load}" if arguments else load


def build_theme() -> Any:
    """System fonts only. Text contrast is at least 4.5:1 in the light and the dark theme."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "Liberation Mono", "monospace"],
    ).set(
        body_background_fill="#f4f6f8",
        body_background_fill_dark="#0d1318",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161e25",
        block_border_color="#d9e0e6",
        block_border_color_dark="#2a353e",
        block_label_text_color="#334155",
        block_label_text_color_dark="#cbd5e1",
        block_title_text_weight="600",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#14857b",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_border_color="#c3ccd5",
        button_secondary_border_color_dark="#3a4752",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10171d",
        input_border_color="#b6c2cc",
        input_border_color_dark="#3a4752",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
        background_fill_primary_dark="#161e25",
        background_fill_secondary_dark="#10171d",
        body_text_color_subdued="#52606d",
        body_text_color_subdued_dark="#9fb0be",
    )


class Layout:
    """The components, by name. Create it inside ``gr.Blocks``. ``events.WebUI`` connects them with handlers.

    Args:
        examples: the example cases.
        takes_feedback: False hides the feedback form.
        pacs: PACS that images may be loaded from.
    """

    def __init__(
        self, examples: Sequence[ExampleCase], takes_feedback: bool, pacs: Sequence[DicomWebServer] = ()
    ) -> None:
        # Kept in the browser's local storage. Neither value is a secret.
        self.passed = gr.BrowserState(False, storage_key="babydoctor-research-use", secret="not a secret")
        self.preferences = gr.BrowserState(None, storage_key="babydoctor-settings", secret="not a secret")
        self.tab = gr.Textbox(visible=False)
        self.timer = gr.Timer(REFRESH_S)
        self.follow = gr.Timer(FOLLOW_S, active=False)
        _html(show.banner(), "bd-banner")
        with gr.Row(elem_id="bd-header"):
            _html(show.title(), "bd-title")
            self.model = gr.Dropdown([], label="Model", elem_id="bd-model", scale=0, min_width=260, visible=False)
            self.theme = gr.Button("Light / dark", size="sm", scale=0, min_width=110, elem_id="bd-theme")
        self.model_status = _html("", "bd-model-status")
        self._build_gate()
        with gr.Row(visible=False, elem_id="bd-main", equal_height=False) as self.main:
            with gr.Column(scale=5, min_width=340, elem_id="bd-column-image"):
                self._build_image(examples, pacs)
            with gr.Column(scale=6, min_width=340, elem_id="bd-column-chat"):
                self._build_chat()
            with gr.Column(scale=4, min_width=280, elem_id="bd-column-side"):
                self.certainty = CertaintyPanel()
                self._build_look_and_settings()
                self._build_report()
                self._build_feedback(takes_feedback)
                self.store = StorePanel(pacs)

    def _build_gate(self) -> None:
        with gr.Column(elem_id="bd-gate", visible=True) as self.gate:
            gr.Markdown(GATE_TEXT.format(keep_min=KEEP_MIN))
            self.agree = gr.Checkbox(False, label="I have read this and will use BabyDoctor for research only")
            self.enter = gr.Button("Continue", variant="primary", interactive=False, elem_id="bd-enter")

    def _build_image(self, examples: Sequence[ExampleCase], pacs: Sequence[DicomWebServer]) -> None:
        self.drop = _html(show.drop_zone(MAX_UPLOAD_BYTES, MAX_STUDY_BYTES), "bd-drop", "dropZone(element, trigger)")
        self.image_status = _html("", "bd-image-status")
        self.pacs = PacsPanel(pacs, script(BUTTONS))
        self.gallery = _html(show.gallery(examples), "bd-gallery", BUTTONS)
        self.study = StudyPanel(script(BUTTONS))
        with gr.Row(elem_id="bd-panes"):
            self.canvas = _html(show.canvas(), "bd-canvas", "viewer(element, trigger)", "viewer.js")
            self.study.build_second(script("second(element, trigger)", file="viewer_second.js"))
        self.viewer = _html(show.viewer(None), "bd-viewer")
        self.text_boxes = _html("", "bd-text-boxes", BUTTONS)
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
        self.chat = _html(show.chat(None), "bd-chat", "chat(element, trigger)", "conversation.js")
        self.turn_note = _html("", "bd-turn-note", "turnNote(element, trigger)", "conversation.js")
        self.status = _html("", "bd-status")
        self.starters = _html(show.chips(QUESTIONS), "bd-starters", BUTTONS)
        with gr.Row(elem_id="bd-ask"):
            self.question = gr.Textbox(
                label="Question",
                placeholder="Your question",
                lines=1,
                max_lines=6,
                max_length=8000,
                scale=5,
                min_width=200,
                elem_id="bd-question",
                elem_classes=KEPT,
            )
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="bd-send")
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="bd-stop")
        with gr.Row(elem_id="bd-turns"):
            self.again = gr.Button("Regenerate", size="sm", min_width=96, elem_id="bd-again")
            self.copy_all = gr.Button("Copy all", size="sm", min_width=96, elem_id="bd-copy-all")
            self.clear = gr.Button("Clear chat", size="sm", min_width=96, elem_id="bd-clear")
            self.export = gr.Button("Export session", size="sm", min_width=110, elem_id="bd-export")
        self.exported = gr.Textbox(visible=False)

    def _build_look_and_settings(self) -> None:
        with gr.Accordion("Where it looked", open=False, elem_id="bd-look-panel", visible=False) as self.look_panel:
            self.look = gr.Button("Show for the last answer", size="sm", elem_id="bd-look")
            self.look_progress = _html("", "bd-look-progress")
            self.look_cancel = gr.Button("Cancel", size="sm", visible=False, elem_id="bd-look-cancel")
            self.look_status = _html("", "bd-look-status")
            self.look_timer = gr.Timer(FOLLOW_S, active=False)
            self.overlay = _html("", "bd-overlay")
            self.words = _html("", "bd-words", BUTTONS)
            gr.Markdown(OVERLAY_NOTE, elem_classes="bd-note")
        with gr.Accordion("Settings", open=False, elem_id="bd-settings"):
            self.temperature = gr.Slider(
                0, 2, 0, step=0.05, label="Temperature", info="0: the most likely words, the same answer every time"
            )
            self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="smaller: fewer unlikely words")
            self.max_tokens = gr.Slider(
                16, MAX_NEW_TOKENS, 256, step=16, label="Longest answer, in tokens", info="about ¾ of a word each"
            )

    def _build_report(self) -> None:
        with gr.Accordion("Report draft", open=False, elem_id="bd-report") as self.report_panel:
            self.assemble = gr.Button("Add all answers to the draft", size="sm", elem_id="bd-assemble")
            self.technique = _section("Technique", 2)
            self.findings = _section("Findings", 4)
            self.impression = _section("Impression", 2)
            gr.Markdown(REPORT_NOTE, elem_classes="bd-note")
            with gr.Row():
                self.save_text = gr.Button("Save as text", size="sm", min_width=80, elem_id="bd-report-text")
                self.save_html = gr.Button("Save as HTML", size="sm", min_width=80, elem_id="bd-report-html")
                self.save_dicom = gr.Button("Save as DICOM SR", size="sm", min_width=80, elem_id="bd-report-dicom")
            self.report_status = _html("", "bd-report-status")
            self.report_file = gr.Textbox(visible=False)

    def _build_feedback(self, takes_feedback: bool) -> None:
        with gr.Accordion("Feedback on the last answer", open=False, elem_id="bd-feedback", visible=takes_feedback):
            self.verdict = gr.Radio(
                [(text, key) for key, text in VERDICTS.items()], label="How was the answer?", elem_id="bd-verdict"
            )
            self.errors = gr.CheckboxGroup(
                [(text, kind) for kind, text in ERROR_KINDS.items()], label="What was wrong?", elem_id="bd-errors"
            )
            self.comment = gr.Textbox(
                label="Comment",
                lines=2,
                max_length=4000,
                info="no names, please",
                elem_id="bd-comment",
                elem_classes=KEPT,
            )
            self.consent = gr.Checkbox(
                False,
                label="Save my feedback with this question and answer on the server",
                info="and how many seconds passed since the answer",
                elem_id="bd-consent",
            )
            self.with_image = gr.Checkbox(False, label="Save the image, too", elem_id="bd-with-image")
            self.save = gr.Button("Save feedback", size="sm", elem_id="bd-save")
            self.saved = _html("", "bd-saved")


def _section(title: str, lines: int) -> gr.Textbox:
    """A section of the report draft."""
    name = f"bd-report-{title.lower()}"
    return gr.Textbox(
        label=title, lines=lines, max_lines=12, max_length=MAX_SECTION_CHARS, elem_id=name, elem_classes=KEPT
    )


def _html(value: str, elem_id: str, call: str = "", file: str = "page.js") -> gr.HTML:
    """An HTML component. ``call`` initializes it in the browser, see ``script``."""
    on_load = script(call, file=file) if call else None
    return gr.HTML(value, js_on_load=on_load, elem_id=elem_id, apply_default_css=False, min_width=200)
