"""``transformers serve`` answers from an export, behind our worker, controller and APIs."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from helpers.serving import (
    PROMPT,
    Server,
    data_url,
    free_port,
    generation,
    llava_answer,
    llava_stream,
    num_cancelled,
    png,
    queue_length,
    start,
    start_controller,
    stop_all,
    tiny_run,
    tiny_worker,
    wait_ready,
    wait_until,
)

from babydoctor.conversation import TEMPLATES, get_template, parse_prompt, prompt_text, render_prompt
from babydoctor.interop.export import export_run
from babydoctor.schema import Turn, UserError

QUESTION = PROMPT.removeprefix("[INST] <image>\n").removesuffix(" [/INST]")


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    export_run(tiny_run(), folder / "tiny", format="hf")
    port = free_port()
    command = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    log = folder / "log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    arguments = [command, "serve", str(folder / "tiny"), "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"]
    with log.open("wb") as file:
        process = subprocess.Popen(arguments, env=environment, stdout=file, stderr=file)
    server = Server(f"http://127.0.0.1:{port}", process, log)

    def up() -> bool:
        assert process.poll() is None, log.read_text()
        return requests.get(f"{server.url}/health", timeout=2).status_code == 200

    try:
        wait_until(up, 90, "transformers serve")
        yield server
    finally:
        stop_all([server])


def exported(server: Server) -> Path:
    """The model that the server serves, named by its path."""
    return server.log.parent / "tiny"


def start_upstream(
    url: str, log: Path, *settings: str, controller: str | None = None, model: str | None = None
) -> Server:
    port = free_port()
    own = [f"worker.port={port}", "worker.model_name=tiny", f"worker.controller={controller or 'null'}", *settings]
    named = ["--model", model] if model else []
    return start(["worker", "--engine", "openai", "--url", url, *named, *own], f"http://127.0.0.1:{port}", log)


@pytest.fixture(scope="module")
def worker(transformers_serve: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("upstream")
    server = start_upstream(transformers_serve.url, folder / "log", model=str(exported(transformers_serve)))
    try:
        yield wait_ready(server)
    finally:
        stop_all([server])


def chat(url: str, model: str, image: bytes, **fields: object) -> requests.Response:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 24, "temperature": 0}
    return requests.post(f"{url}/v1/chat/completions", json=body | fields, timeout=60)


def test_same_answer_from_transformers_serve_as_from_our_worker(transformers_serve: Server, worker: Server) -> None:
    """Another program with our weights and the export's chat template gives the same text over every API."""
    model = str(exported(transformers_serve))
    prompt = prompt_text(render_prompt([Turn("user", f"<image>\n{QUESTION}")], get_template("llava_llama_2")))
    for seed in (1, 2):
        image = png(seed, (56, 56))
        own = chat(tiny_worker().url, "tiny", image).json()["choices"][0]["message"]["content"]
        direct = chat(transformers_serve.url, model, image).json()["choices"][0]["message"]["content"]
        through = chat(worker.url, "tiny", image).json()["choices"][0]
        assert len(own) > 10
        assert direct.strip() == own.strip() == through["message"]["content"].strip()
        assert through["finish_reason"] == "length"
        streamed = llava_answer(worker.url, generation(image, prompt=prompt, max_new_tokens=24))
        assert streamed.strip() == own.strip()


def test_answers_stream_through_a_controller(transformers_serve: Server, tmp_path: Path) -> None:
    controller = start_controller(tmp_path / "controller.log")
    servers = [controller]
    try:
        wait_until(lambda: requests.get(controller.url + "/healthz", timeout=2).ok, 180, "controller")
        servers.append(
            start_upstream(
                transformers_serve.url,
                tmp_path / "log",
                controller=controller.url,
                model=str(exported(transformers_serve)),
            )
        )

        def listed() -> bool:
            return requests.post(controller.url + "/list_models", timeout=5).json()["models"] == ["tiny"]

        wait_until(listed, 180, "registration")
        prompt = prompt_text(render_prompt([Turn("user", f"<image>\n{QUESTION}")], get_template("llava_llama_2")))
        chunks = list(llava_stream(controller.url, generation(png(3), prompt=prompt, max_new_tokens=40)))
        texts = [chunk["text"].removeprefix(prompt) for chunk in chunks]
        assert all(chunk["error_code"] == 0 for chunk in chunks)
        assert len({text for text in texts if text}) > 3, texts
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    finally:
        stop_all(servers)


def test_a_client_that_disconnects_frees_its_slot(worker: Server) -> None:
    before = num_cancelled(worker)
    prompt = prompt_text(render_prompt([Turn("user", QUESTION)], get_template("llava_llama_2")))
    stream = llava_stream(worker.url, generation(prompt=prompt, max_new_tokens=1024))
    for chunk in stream:
        if len(chunk["text"]) > len(prompt):
            break
    assert queue_length(worker.url) == 1
    stream.close()
    wait_until(lambda: queue_length(worker.url) == 0, 180, "the slot is free")
    assert num_cancelled(worker) == before + 1
    assert chat(worker.url, "tiny", png(1)).status_code == 200


class Faulty(BaseHTTPRequestHandler):
    """A server that lists a model and then fails as the request's text asks."""

    left = threading.Event()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["content-length"])).decode()
        if "busy" in text:
            self._send(429, b"{}", {"retry-after": "7"})
        elif "too long" in text:
            self._send(400, b'{"error": {"message": "maximum context length is 64"}}')
        elif "broken" in text:
            self._send(500, b"Traceback: secret")
        else:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "half an"}}]}\n\n')
            self.wfile.flush()
            if "forever" in text:
                try:
                    while True:
                        time.sleep(0.05)
                        self.wfile.write(b'data: {"choices": [{"delta": {"content": "."}}]}\n\n')
                        self.wfile.flush()
                except OSError:
                    Faulty.left.set()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def test_errors_of_the_upstream_server_are_reported(tmp_path: Path) -> None:
    """Busy, refused, broken, interrupted, too slow, gone: each error is reported as such, and no internals leak."""
    faulty = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=faulty.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{faulty.server_address[1]}"
    server = start_upstream(url, tmp_path / "log", "limits.request_timeout_s=3")
    template = get_template("llava_llama_2")

    def ask(text: str) -> requests.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
        return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=20)

    try:
        wait_ready(server)
        busy = ask("busy")
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "queue_full")
        refused = ask("too long")
        assert refused.status_code == 400
        assert "maximum context length is 64" in refused.json()["error"]["message"]
        broken = ask("broken")
        assert broken.status_code == 500
        assert "secret" not in broken.text
        assert ask("half").json()["error"]["code"] == "upstream_lost"
        assert (ask("forever").status_code, Faulty.left.wait(5)) == (504, True)
        Faulty.left.clear()
        prompt = prompt_text(render_prompt([Turn("user", "forever")], template))
        stream = llava_stream(server.url, generation(prompt=prompt))
        next(stream)
        stream.close()
        assert Faulty.left.wait(2), "the connection behind stayed open after the client had left"
        faulty.shutdown()
        faulty.server_close()
        assert ask("half").json()["error"]["code"] == "upstream_lost"
        wait_until(lambda: requests.get(f"{server.url}/readyz", timeout=2).status_code == 503, 15, "unready")
        assert queue_length(server.url) == 0
    finally:
        stop_all([server])


def test_wrong_arguments_are_named() -> None:
    from babydoctor.serve.settings import ServeSettings
    from babydoctor.serve.worker.upstream import load_upstream

    with pytest.raises(UserError, match=r"--url 'http://127\.0\.0\.1:9'"):
        load_upstream("http://127.0.0.1:9", None, "v1", ServeSettings(), None)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_prompts_are_parsed_into_turns(name: str) -> None:
    template = get_template(name)
    turns = [Turn("user", "<image>\nWhat is this?"), Turn("assistant", "A CT."), Turn("user", "Why {so}?")]
    for system in (None, "Be brief.", ""):
        for count in (1, 3):
            prompt = prompt_text(render_prompt(turns[:count], template, system=system))
            # A template without a default system prompt renders an empty and the default system prompt equally.
            known = system if system or template.system else None
            assert parse_prompt(prompt, template) == (known, turns[:count])
            assert parse_prompt(template.begin + prompt, template) == (known, turns[:count])
    with pytest.raises(UserError, match="not a conversation"):
        parse_prompt("What is this?", template)
