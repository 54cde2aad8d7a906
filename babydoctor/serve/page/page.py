"""The page put together: its elements, what each of them calls, and the gate before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from babydoctor.serve.page.answer_handlers import AnswerHandlers
from babydoctor.serve.page.app import Uploads
from babydoctor.serve.page.chat_handlers import ConversationHandlers
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.errors import PageError
from babydoctor.serve.page.examples import build_examples, gallery_html
from babydoctor.serve.page.handlers import Changes, Handlers
from babydoctor.serve.page.image_handlers import ImageHandlers
from babydoctor.serve.page.layout import Layout
from babydoctor.serve.page.session import Sessions
from babydoctor.serve.page.style import DOWNLOAD_SCRIPT, THEME_SCRIPT


class Page:
    """The page.

    Args:
        client: asks the controller.
        uploads: files that wait to be taken.
        feedback_file: None: no feedback is taken.
    """

    def __init__(self, client: ControllerClient, uploads: Uploads, feedback_file: Path | None) -> None:
        self.client = client
        self.uploads = uploads
        self.feedback_file = feedback_file
        self.sessions = Sessions()
        self.examples = {example.key: example for example in build_examples()}

    def close(self) -> None:
        """Stop all running answers."""
        self.sessions.stop_all()

    def build(self) -> gr.Blocks:
        """Lay the page out and connect it."""
        with gr.Blocks(title="BabyDoctor", analytics_enabled=False) as demo:
            self.ui = Layout(gallery_html([*self.examples.values()]), self.feedback_file is not None)
            self._connect(demo)
        return demo

    def _connect(self, demo: gr.Blocks) -> None:
        image = [
            self.ui.viewer,
            self.ui.window_group,
            self.ui.preset,
            self.ui.center,
            self.ui.width,
            self.ui.frame,
            self.ui.facts,
        ]
        chat = [
            self.ui.chat,
            self.ui.question,
            self.ui.send,
            self.ui.stop,
            self.ui.status,
            self.ui.overlay,
            self.ui.words,
        ]
        gate = [self.ui.gate, self.ui.main, self.ui.model, self.ui.status, self.ui.passed]
        # Only answers go through Gradio's queue. Its stream to the browser ends with the last queued event; one that
        # joins in that moment is not heard: an answer would stand still because the list of models was refreshed.
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        queued: dict[str, Any] = private | {"queue": True}
        latest: dict[str, Any] = private | {"trigger_mode": "always_last"}

        gates = GateHandlers(self.ui, self.sessions, self.client)
        demo.load(gates.on_load, [self.ui.passed], gate, **private)
        demo.unload(gates.on_unload)
        self.ui.theme.click(None, js=THEME_SCRIPT)
        self.ui.timer.tick(gates.on_tick, [self.ui.model], [self.ui.model], **private)
        self.ui.agree.change(lambda agreed: gr.Button(interactive=agreed), [self.ui.agree], [self.ui.enter], **private)
        self.ui.enter.click(gates.on_enter, [self.ui.agree], gate, **private)

        images = ImageHandlers(self.ui, self.sessions, self.client, self.uploads, self.examples)
        loaded = [*image, *chat]
        self.ui.drop.upload(images.on_upload, None, loaded, **private)
        self.ui.gallery.select(images.on_example, None, loaded, **private)
        self.ui.frame.input(images.on_frame, [self.ui.frame], [*image, self.ui.status], **latest)
        self.ui.preset.input(images.on_preset, [self.ui.preset], [*image, self.ui.status], **latest)
        for slider in (self.ui.center, self.ui.width):
            slider.input(images.on_window, [self.ui.center, self.ui.width], [*image, self.ui.status], **latest)

        talk = ConversationHandlers(self.ui, self.sessions, self.client)
        settings = [self.ui.model, self.ui.temperature, self.ui.top_p, self.ui.max_tokens]
        gr.on([self.ui.send.click, self.ui.question.submit], talk.on_ask, [self.ui.question, *settings], chat, **queued)
        self.ui.chat.clear(talk.on_clear, None, chat, **private)
        self.ui.again.click(talk.on_again, settings, chat, **queued)
        self.ui.stop.click(talk.on_stop, None, [self.ui.stop], **private)
        self.ui.clear.click(talk.on_clear, None, chat, **private)
        self.ui.starters.select(talk.on_starter, None, [self.ui.question], **private)
        answers = AnswerHandlers(self.ui, self.sessions, self.client, self.feedback_file)
        self.ui.export.click(answers.on_export, None, [self.ui.exported, self.ui.status], **private).then(
            None, [self.ui.exported], None, js=DOWNLOAD_SCRIPT
        )
        self.ui.look.click(answers.on_look, None, [self.ui.overlay, self.ui.words, self.ui.status], **private)
        self.ui.words.select(answers.on_word, None, [self.ui.overlay, self.ui.status], **private)
        feedback = [self.ui.verdict, self.ui.errors, self.ui.comment, self.ui.consent, self.ui.with_image]
        self.ui.save.click(answers.on_save, feedback, [*feedback, self.ui.saved, self.ui.status], **private)


class GateHandlers(Handlers):
    """Handlers of the notice before the page, and of the list of models."""

    async def on_load(self, passed: bool, request: gr.Request) -> Changes:
        """A tab was opened, or opened anew."""
        return await self._open_gate(request) if passed is True else {self.ui.gate: gr.Column(visible=True)}

    async def on_enter(self, agreed: bool, request: gr.Request) -> Changes:
        """The user has read the notice."""
        return await self._open_gate(request) | {self.ui.passed: True} if agreed else {}

    async def _open_gate(self, request: gr.Request) -> Changes:
        self.sessions.get(request.session_hash).has_accepted = True
        changes: Changes = {self.ui.gate: gr.Column(visible=False), self.ui.main: gr.Row(visible=True)}
        try:
            models = await self.client.models()
        except PageError as error:
            models = []
            changes[self.ui.status] = self.sentence(error)
        else:
            if not models:
                changes[self.ui.status] = self.sentence(PageError("no_worker"))
        value = models[0] if models else None
        return changes | {self.ui.model: gr.Dropdown(choices=models, value=value, visible=True)}

    async def on_tick(self, model: str | None) -> Any:
        """Keep the list of models fresh; what the user has chosen stays chosen while it is there."""
        try:
            models = await self.client.models()
        except PageError:
            return gr.skip()
        return gr.Dropdown(choices=models, value=model if model in models else (models[0] if models else None))

    def on_unload(self, request: gr.Request) -> None:
        """The tab was closed: forget its image and its conversation."""
        self.sessions.forget(request.session_hash)
