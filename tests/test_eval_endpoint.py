"""Evaluate a server over OpenAI's API: our own worker gives the same answers as the run."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from helpers.eval_rows import write_rows
from helpers.serving import free_port, tiny_run, tiny_worker

from babydoctor.config import TaskConfig
from babydoctor.eval.ask import GenerationConfig, read_predictions
from babydoctor.eval.endpoint import Endpoint
from babydoctor.eval.run import EvalConfig, evaluate
from babydoctor.schema import UserError

CONFIG = EvalConfig(
    images_as=("right", "shuffled", "blank", "noise"),
    generation=GenerationConfig(max_new_tokens=4, batch_size=3),
    num_resamples=100,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TaskConfig:
    """Six yes/no questions about three images."""
    return TaskConfig(task="rows", data=str(write_rows(tmp_path_factory.mktemp("data"), ["yes"] * 6)))


def answers(folder: Path, condition: str) -> dict[str, str]:
    return {p.id: p.answer for p in read_predictions(folder / f"predictions-{condition}.jsonl")}


def test_our_own_server_answers_as_the_run_does(rows: TaskConfig, tmp_path: Path) -> None:
    worker = tiny_worker()
    name = requests.get(f"{worker.url}/v1/models").json()["data"][0]["id"]
    reported: list[tuple[str, int, int]] = []
    endpoint = Endpoint(f"{worker.url}/v1", name)
    result = evaluate(
        tmp_path / "server", rows, CONFIG, endpoint=endpoint, progress=lambda *progress: reported.append(progress)
    )
    evaluate(tmp_path / "run", rows, CONFIG, run=tiny_run())
    assert [reported.count((f"{condition} image", 6, 6)) for condition in CONFIG.images_as] == [1, 1, 1, 1]
    for condition in ("right", "shuffled"):
        assert answers(tmp_path / "server", condition) == answers(tmp_path / "run", condition)
    assert result["num_failed"] == dict.fromkeys(CONFIG.images_as, 0)
    assert result["endpoint"] == {"url": f"{worker.url}/v1", "model": name}
    with pytest.raises(UserError, match=r"--model 'other': http.* serves '"):
        evaluate(tmp_path / "other", rows, CONFIG, endpoint=Endpoint(f"{worker.url}/v1", "other"))


@contextmanager
def serving(respond: Callable[[int, dict[str, Any]], tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """A server whose chat requests are answered by ``respond`` with their number. Yields its URL."""
    counted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            counted.append(body)
            self.send(*respond(len(counted), body))

        def send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def chat(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


ONE = EvalConfig(("right",), GenerationConfig(batch_size=1), num_resamples=100)


def test_a_busy_server_is_retried_and_log_probabilities_are_optional(rows: TaskConfig, tmp_path: Path) -> None:
    def respond(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body.get("logprobs"):
            return 400, {"error": {"message": "no log probabilities here"}}
        if number % 3 == 0:
            return (429, 503)[number % 2], {"error": {"message": "busy"}}
        return 200, chat("Yes.")

    with serving(respond) as url:
        result = evaluate(tmp_path, rows, ONE, endpoint=Endpoint(url, "m"))
    assert set(answers(tmp_path, "right").values()) == {"Yes."} and result["num_failed"]["right"] == 0


def test_a_refused_question_is_recorded_and_a_lost_server_keeps_earlier_answers(
    rows: TaskConfig, tmp_path: Path
) -> None:
    def refuse(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = body["messages"][0]["content"][-1]["text"]
        return (422, {"error": {"message": "too strange"}}) if text.startswith("Question 2") else (200, chat("no"))

    with serving(refuse) as url:
        result = evaluate(tmp_path / "refused", rows, ONE, endpoint=Endpoint(url, "m"))
    assert result["num_failed"]["right"] == 1
    failed = [p for p in read_predictions(tmp_path / "refused" / "predictions-right.jsonl") if not p.answer]
    assert [p.id for p in failed] == ["q2"] and "too strange" in failed[0].finish_reason

    def forbid(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return (200, chat("no")) if number <= 2 else (401, {"error": {"message": "wrong key"}})

    with serving(forbid) as url, pytest.raises(UserError, match=r"401 \(wrong key\); set OPENAI_API_KEY"):
        evaluate(tmp_path / "lost", rows, ONE, endpoint=Endpoint(url, "m"))
    assert len(read_predictions(tmp_path / "lost" / "predictions-right.jsonl")) == 2
    with serving(lambda number, body: (200, chat("no"))) as url:
        evaluate(tmp_path / "lost", rows, ONE, endpoint=Endpoint(url, "m"))
    assert len(answers(tmp_path / "lost", "right")) == 6


def test_a_question_without_an_image_is_plain_text(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Is CT ionizing?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    asked: list[Any] = []

    def record(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked.append(body["messages"])
        return 200, chat("yes")

    task = TaskConfig(task="rows", data=str(tmp_path / "rows.json"))
    with serving(record) as url:
        result = evaluate(tmp_path / "out", task, ONE, endpoint=Endpoint(url, "m"))
    assert asked == [[{"role": "user", "content": "Is CT ionizing?"}]]
    assert result["conditions"]["right"]["figures"]["closed_accuracy"]["value"] == 1


def test_an_unreachable_server_is_named(rows: TaskConfig, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    program = "import sys; from babydoctor.cli.main import main; main()"
    command = [sys.executable, "-c", program, "eval", "--task", "rows", "--data", rows.data, "--out", str(tmp_path)]
    done = subprocess.run([*command, "--endpoint", url, "--model", "m"], capture_output=True, text=True)
    assert done.returncode == 2 and f"--endpoint {url} does not answer" in done.stderr, done.stderr
    done = subprocess.run([*command, "--endpoint", url], capture_output=True, text=True)
    assert done.returncode == 2 and "--endpoint URL and --model NAME belong together" in done.stderr
