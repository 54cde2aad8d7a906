"""Load never causes a 5xx, refused workers name the fix, and browsers of allowed origins may call."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import requests
from helpers.serving import start_controller, start_worker, stop_all, tiny_run, wait_until

from babydoctor.serve.api.errors import ERROR_KINDS, ApiCode, ApiError
from babydoctor.serve.api.llava_stream import LlavaReader, LlavaWriter
from babydoctor.serve.api.openai.chat import ChatRequest, ChatWriter
from babydoctor.serve.api.responses import CollectedAnswer, StreamedAnswer
from babydoctor.serve.api.streaming import AnswerStream
from babydoctor.serve.settings import Limits


async def refuse_late(code: ApiCode) -> AnswerStream:
    """A refusal after the time at which a stream's headers are sent."""
    await asyncio.sleep(0.05)
    raise ApiError(code, "Not now.")


def respond(response: CollectedAnswer | StreamedAnswer, path: str) -> tuple[int, dict[str, str], bytes]:
    """Run a response as a server does: status, headers and body."""
    sent: list[dict] = []

    async def receive() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    async def run() -> None:
        await response({"type": "http", "path": path}, receive, send)

    asyncio.get_event_loop().run_until_complete(run())
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent)


@pytest.fixture(autouse=True)
def loop():
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


CODES: list[ApiCode] = ["queue_full", "bad_image", "image_too_large", "context_length_exceeded", "draining"]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("path", ["/worker_generate", "/v1/chat/completions"])
def test_a_late_refusal_keeps_the_status_of_its_code(loop, code: ApiCode, path: str):
    opening = loop.create_task(refuse_late(code))
    status, headers, body = respond(CollectedAnswer(opening, lambda answers: {}, Limits()), path)
    kind = ERROR_KINDS[code]
    assert status == (400 if kind.status == 422 and path.startswith("/v1") else kind.status)
    assert json.loads(body)["error"]["code"] == code
    assert headers.get("retry-after") == (None if kind.retry_after_s is None else str(kind.retry_after_s))


def test_a_late_refusal_of_a_stream_is_an_error_event_with_its_code(loop):
    writer = LlavaWriter("prompt")
    opening = loop.create_task(refuse_late("queue_full"))
    status, _, body = respond(StreamedAnswer(opening, writer.encode, Limits(), media_type="x/y"), "/x")
    (delta,) = LlavaReader(front="prompt").feed(body)
    assert status == 200 and delta.error is not None and delta.error.code == "queue_full"

    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}]})
    opening = loop.create_task(refuse_late("queue_full"))
    chat = ChatWriter(request, "id")
    status, _, body = respond(StreamedAnswer(opening, chat.event, Limits(), media_type="x/y"), "/v1/x")
    assert status == 200 and json.loads(body.removeprefix(b"data: "))["error"]["code"] == "queue_full"


SECRET = "a-registration-secret-for-tests"


def test_a_refused_worker_names_the_fix_and_allowed_origins_may_call(tmp_path: Path):
    controller = start_controller(
        tmp_path / "controller.log",
        "cors_origins=[https://app.example.org]",
        environment={"BABYDOCTOR_REGISTRATION_SECRET": SECRET},
    )
    settings = f"worker.controller={controller.url}"
    worker = start_worker(tiny_run(), tmp_path / "worker.log", settings)
    try:
        wait_until(lambda: "controller refuses this worker" in worker.log.read_text(), 180, "the refusal")
        (line,) = [line for line in worker.log_lines() if line["event"] == "controller refuses this worker"]
        assert line["code"] == "bad_secret"
        assert "BABYDOCTOR_REGISTRATION_SECRET is not set" in line["hint"] and "babydoctor serve" in line["hint"]

        asked = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "POST"}
        reply = requests.options(f"{controller.url}/v1/chat/completions", headers=asked, timeout=60)
        assert reply.ok and reply.headers["access-control-allow-origin"] == "https://app.example.org"
        reply = requests.options(
            f"{controller.url}/v1/chat/completions", headers=asked | {"Origin": "https://other.org"}, timeout=60
        )
        assert "access-control-allow-origin" not in reply.headers
    finally:
        stop_all([worker, controller])
