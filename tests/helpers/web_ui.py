"""Fixtures and steps for browser tests: Chromium with a real controller, workers and web UI.

Test modules import the fixtures by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydicom.examples import get_path

from helpers.serving import (
    Server,
    free_port,
    start,
    start_controller,
    start_worker,
    stop_all,
    tiny_run,
    wait_ready,
    wait_until,
)

CHROMIUM = os.environ.get("BABYDOCTOR_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (set BABYDOCTOR_CHROMIUM)")

FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
]
PATIENT = "Zzyzx^Quentin"
TIMEOUT_MS = 60_000
START_S = 240
"""On a busy machine a process may take minutes to load torch."""


class Parts:
    """Controller, worker and web UI as processes.

    Args:
        page_settings: more settings of the web UI, ``key=value``.
        page_environment: more environment variables of the web UI.
    """

    def __init__(
        self, folder: Path, page_settings: Sequence[str] = (), page_environment: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._page_settings, self._page_environment = page_settings, page_environment
        self.feedback = folder / "feedback.jsonl"
        self.controller = start_controller(folder / "controller.log")
        self.worker = self.start_worker()
        self._port = free_port()
        self.page = self.start_page()
        wait_ready(self.controller, START_S)
        wait_until(self.page_answers, START_S, "the web UI")
        wait_until(lambda: self.models() == ["tiny"], START_S, "the model")

    def start_worker(self) -> Server:
        settings = (f"worker.controller={self.controller.url}", "worker.heart_beat_s=1", "limits.max_queue=0")
        return start_worker(tiny_run(), self.folder / "worker.log", *settings, "engine.max_running=2")

    def restart_worker(self) -> None:
        """Replace a worker that was killed, and wait until the new one is ready."""
        self.worker = self.start_worker()
        wait_ready(self.worker, START_S)
        wait_until(lambda: "tiny" in self.models(), START_S, "the model's return")

    def start_page(self) -> Server:
        arguments = ["web", f"page.port={self._port}", f"page.feedback_file={self.feedback}", *self._page_settings]
        url = f"http://127.0.0.1:{self._port}"
        arguments += ["--controller", self.controller.url]
        return start(arguments, url, self.folder / "page", environment=self._page_environment)

    def page_answers(self) -> bool:
        return requests.get(f"{self.page.url}/healthz", timeout=2).status_code == 200

    def models(self) -> list[str]:
        return sorted(requests.post(f"{self.controller.url}/list_models", timeout=5).json()["models"])

    def queue_length(self) -> int:
        return requests.post(f"{self.worker.url}/worker_get_status", timeout=5).json()["queue_length"]


class ScriptedServer:
    """An OpenAI-compatible server for an upstream worker. The test writes its answers piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.num_allowed = 0
        self.num_requests = 0
        self.last_request: dict[str, Any] = {}
        self.num_finished = 0
        app = FastAPI()
        app.get("/v1/models")(self._models)
        app.post("/v1/chat/completions")(self._chat)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started, START_S, "the scripted server")

    def say(self, *pieces: str, allow: int | None = None) -> None:
        """The next answer, and the number of pieces that are sent before ``allow`` is raised."""
        self.pieces = list(pieces)
        self.num_allowed = len(pieces) if allow is None else allow

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    async def _models(self) -> dict[str, Any]:
        return {"data": [{"id": "scripted"}]}

    async def _chat(self, request: Request) -> StreamingResponse:
        self.num_requests += 1
        self.last_request = await request.json()
        return StreamingResponse(self._stream(list(self.pieces)), media_type="text/event-stream")

    async def _stream(self, pieces: list[str]) -> AsyncIterator[str]:
        for index, piece in enumerate(pieces):
            while index >= self.num_allowed:
                await asyncio.sleep(0.01)
            yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
        yield f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'stop'}]})}\n\ndata: [DONE]\n\n"
        self.num_finished += 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    running = Parts(tmp_path_factory.mktemp("page"))
    yield running
    stop_all([running.page, running.controller, running.worker])


@pytest.fixture(scope="module")
def scripted(parts: Parts) -> Iterator[ScriptedServer]:
    """A second model, ``scripted``, in addition to ``tiny``."""
    server = ScriptedServer()
    port = free_port()
    arguments = ["worker", "--engine", "openai", "--url", server.url, f"worker.port={port}"]
    settings = [f"worker.controller={parts.controller.url}", "worker.heart_beat_s=1"]
    worker = start([*arguments, *settings], f"http://127.0.0.1:{port}", parts.folder / "scripted.log")
    wait_until(lambda: parts.models() == ["scripted", "tiny"], START_S, "both models")
    yield server
    stop_all([worker])
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def visitor(browser: Any, parts: Parts, **options: Any) -> Iterator[Any]:
    """A new tab on the web UI, in a new browser context."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.goto(parts.page.url)
    yield page
    context.close()


@pytest.fixture
def tab(browser: Any, parts: Parts) -> Iterator[Any]:
    """A new tab in a new browser context. A request to another server or any error in the tab fails the test."""
    foreign: list[str] = []
    faults: list[str] = []
    with visitor(browser, parts) as page:

        def on_request(request: Any) -> None:
            if not request.url.startswith((parts.page.url, "data:", "blob:")):
                foreign.append(request.url)

        page.on("request", on_request)
        page.on("pageerror", lambda error: faults.append(str(error)))

        def on_message(message: Any) -> None:
            address = message.location["url"]
            # The viewer may ask for the next frame of an image that the server has just replaced.
            is_late = "status of 404" in message.text and ("/page/frame/" in address or "/page/link/" in address)
            if message.type == "error" and not is_late:
                faults.append(f"{message.text} {address}")

        page.on("console", on_message)
        page.reload()
        yield page
    assert not foreign and not faults, (foreign, faults)


def expect(what: Any) -> Any:
    """Playwright's assertions, with time for a busy machine."""
    from playwright.sync_api import expect as expect_

    expect_.set_options(timeout=TIMEOUT_MS)
    return expect_(what)


def enter(tab: Any) -> None:
    """Accept the notice."""
    tab.get_by_label("I have read this").check()
    tab.get_by_role("button", name="Continue").click()
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()


def load(tab: Any, data: bytes) -> None:
    """Load a file whose name would identify a person."""
    tab.locator("#bd-file").set_input_files({"name": f"{PATIENT}.bin", "mimeType": "", "buffer": data})


def load_example(tab: Any, name: str = "Real CT") -> None:
    tab.get_by_role("button", name=name).click()
    expect(tab.locator("#bd-viewer img")).to_be_visible()
    expect(tab.locator("#bd-facts")).to_contain_text(name)


def choose_model(tab: Any, name: str) -> None:
    tab.get_by_label("Model").click()
    tab.get_by_role("option", name=name).click()
    expect(tab.get_by_label("Model")).to_have_value(name)


def shown(tab: Any) -> str:
    return tab.locator("#bd-viewer img").get_attribute("src")


def answers(tab: Any) -> Any:
    return tab.locator("#bd-chat .bd-answer")


def question_box(tab: Any) -> Any:
    return tab.get_by_label("Question", exact=True)


def box_of(locator: Any) -> dict[str, float]:
    """Position and size of an element in CSS pixels, once it is visible."""
    expect(locator).to_be_visible()
    box = locator.bounding_box()
    assert box is not None, locator
    return dict(box)


def shorten(tab: Any, num_tokens: int = 32) -> None:
    tab.get_by_role("button", name="Settings").click()
    box = tab.get_by_role("spinbutton", name="Longest answer")
    box.fill(str(num_tokens))
    box.press("Enter")


def ask(tab: Any, question: str) -> None:
    question_box(tab).fill(question)
    question_box(tab).press("Enter")


def wait_for_answer(tab: Any) -> str:
    """Wait for the end of the last answer. Returns its text as the model wrote it."""
    expect(question_box(tab)).to_have_value("")
    expect(tab.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    expect(tab.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(answers(tab).last).not_to_have_text("…")
    if answers(tab).last.inner_text() == "(no words)":
        return ""
    copied = tab.locator("#bd-chat .bd-message.bot").last.locator("[data-copy]").get_attribute("data-copy")
    return str(copied)


def window(center: float, width: float) -> re.Pattern[str]:
    """The caption of a view under this window."""
    return re.compile(f"level {center:g}, width {width:g}")


def patient_dicom(without: tuple[str, ...] = (), **changes: Any) -> bytes:
    """pydicom's CT with a patient's name, and with some attributes changed or left out."""
    import pydicom

    dataset = pydicom.dcmread(get_path("ct"))
    dataset.PatientName = PATIENT
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    for keyword in without:
        if keyword in dataset:
            delattr(dataset, keyword)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def switch_scheme(tab: Any) -> None:
    """Switch between light and dark, and wait until the colors no longer change."""
    tab.get_by_role("button", name="Light / dark").click()
    running = "document.getAnimations().some(one => one instanceof CSSTransition && one.playState === 'running')"
    tab.wait_for_function(f"!{running}")


def axe_violations(tab: Any) -> list[str]:
    """Serious and critical findings of axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    response = axe.Axe().run(tab).response
    assert len(response["passes"]) > 20
    found = response["violations"]
    return [
        f"{each['id']}: {node['html'][:160]} {node['any'][:1]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
