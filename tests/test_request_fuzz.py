"""Damaged requests to a controller, a worker and the web UI are refused with field and reason, without side effects.

Seeded. ``BABYDOCTOR_REQUEST_FUZZ=10000`` sends that many requests instead of a few hundred.
"""

from __future__ import annotations

import collections
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from helpers.image_files import damage
from helpers.processes import resident_bytes
from helpers.request_mutations import Sent, api_seeds, mutate
from helpers.serving import Server, bare_base64, generation, llava_answer, png, queue_length, stop_all, wait_until
from helpers.web_ui import Parts

from babydoctor.serve.api.errors import API_CODES

NUM_REQUESTS = int(os.environ.get("BABYDOCTOR_REQUEST_FUZZ", "300"))
SEED = int(os.environ.get("BABYDOCTOR_FUZZ_SEED", "0"))

VALUES: dict[str, Any] = {"slider": 1, "number": 1, "checkbox": True, "checkboxgroup": ["style"], "browserstate": None}
"""What components of a kind send; the others send text."""

JARGON = re.compile(r"Input should|Field required|\[type=|pydantic|Traceback|type_error|function-after|list\[|literal")

UNAVAILABLE = ("no_worker", "worker_lost", "not_ready")
"""Valid 503 responses to damaged requests: the fuzzer registers workers that do not exist."""

WITHOUT_FIELD = ("not_found", "method_not_allowed", "bad_json", "json_too_deep", "json_too_large", "queue_full")

GROWTH_BYTES = 96 * 2**20


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    parts = Parts(tmp_path_factory.mktemp("fuzz"))
    yield parts
    stop_all([parts.page, parts.worker, parts.controller])


def page_seeds(page: Server) -> list[Sent]:
    """Requests of the web UI's own routes, and of each event handler through Gradio's."""
    config = requests.get(f"{page.url}/config", timeout=60).json()
    session = {"session_hash": "fuzz", "trigger_id": None, "event_data": {"word": 0, "example": "a", "token": "a"}}
    seeds = []
    kinds = {component["id"]: component["type"] for component in config["components"]}
    for function in config["dependencies"]:
        if function["backend_fn"]:
            data = [VALUES.get(kinds[number], "a") for number in function["inputs"]]
            body = session | {"fn_index": function["id"], "data": data}
            seeds.append(Sent("page", "POST", "/gradio_api/run/predict", body))
    body = session | {"fn_index": 0, "data": []}
    for path in ("/gradio_api/queue/join", "/gradio_api/call/predict", "/gradio_api/component_server"):
        seeds.append(Sent("page", "POST", path, body))
    seeds *= 2  # events are most of what the web UI does
    for path in ("/gradio_api/reset", "/gradio_api/cancel"):
        seeds.append(Sent("page", "POST", path, {"session_hash": "fuzz", "fn_index": 0, "event_id": "a"}))
    for path in ("/", "/healthz", "/config", "/gradio_api/info", "/gradio_api/heartbeat/fuzz", "/page/static/page.js"):
        seeds.append(Sent("page", "GET", path))
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/queue/data?session_hash=fuzz", "/theme.css"):
        seeds.append(Sent("page", "GET", path))
    seeds += [Sent("page", "POST", "/page/upload", raw=png())] * 4
    return seeds


class Fuzzer:
    """Sends requests and checks each reply."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.servers = {"worker": parts.worker, "controller": parts.controller, "page": parts.page}
        self.client = requests.Session()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []

    def send(self, sent: Sent) -> None:
        started = time.monotonic()
        url = self.servers[sent.part].url + sent.path
        headers = {name: value.encode("latin-1", "replace") for name, value in sent.headers.items()}
        try:
            with self.client.request(
                sent.method, url, data=sent.data, headers=headers, stream=True, timeout=60, allow_redirects=False
            ) as response:
                endless = "/heartbeat/" in sent.path or "/queue/data" in sent.path or response.status_code == 101
                content = next(response.iter_content(4096), b"") if endless else response.content
                fault = self.fault(sent, response, content)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader):
            self.outcomes["not sent"] += 1
            return
        except requests.RequestException as error:
            fault = repr(error)
            if self.servers[sent.part].process.poll() is not None:
                raise AssertionError(f"{sent.part} has ended: {sent}") from error
        if time.monotonic() - started > 30:
            fault = fault or f"took {time.monotonic() - started:.0f} s"
        if fault:
            self.faults.append(f"{sent.part} {sent.method} {sent.path[:80]}: {fault}\n    sent {str(sent.data)[:600]}")

    def fault(self, sent: Sent, response: requests.Response, content: bytes) -> str:
        """The problem with a reply; "" if there is none."""
        status = response.status_code
        self.outcomes[f"{sent.part} {status}"] += 1
        if status < 400:
            text = content.decode("utf-8", "replace")
            is_failure = re.search(r'"code": ?"(internal|worker_failed|server_error)"', text)
            return f"a failure inside the stream: {text[-300:]}" if is_failure else ""
        if sent.part == "page" and not sent.path.startswith("/gradio_api/run"):
            return f"status {status}: {content[:300]!r}" if status >= 500 else ""
        if sent.method == "HEAD":
            return f"status {status}" if status >= 500 else ""
        try:
            error = json.loads(content)["error"]
            code, message = error["code"], error["message"]
        except (ValueError, KeyError, TypeError):
            plain = content.startswith(b"Invalid HTTP request")  # uvicorn's own, before the application
            return "" if plain and status == 400 else f"status {status} without an error object: {content[:200]!r}"
        if status >= 500 and not (status == 503 and code in UNAVAILABLE):
            return f"status {status}: {error}"
        if code not in API_CODES or not message or len(message) > 500 or JARGON.search(message):
            return f"a bad sentence: {error}"
        has_field = error["param"] or "body" in message or "The" in message
        return "" if code in WITHOUT_FIELD or has_field else f"no field is named: {error}"


def with_damaged_image(sent: Sent, rng: np.random.Generator) -> Sent:
    """The request with a damaged image."""
    whole = png()
    if sent.raw is not None:
        return replace(sent, raw=damage(whole, rng))
    text = json.dumps(sent.body).replace(bare_base64(whole), bare_base64(damage(whole, rng)))
    return replace(sent, body=json.loads(text))


def test_damaged_requests_are_refused_without_side_effects(parts: Parts) -> None:
    rng = np.random.default_rng(SEED)
    apis, page = api_seeds(), page_seeds(parts.page)
    fuzzer = Fuzzer(parts)
    image, question = png(5), {"prompt": "[INST] <image>\nWhat? [/INST]", "max_new_tokens": 8}
    body = generation(image) | question
    before = llava_answer(parts.controller.url, body)
    for sent in [*apis, *page]:
        fuzzer.send(sent)
    assert not fuzzer.faults, "undamaged requests:\n" + "\n".join(fuzzer.faults)
    sizes: dict[str, list[int]] = {part: [] for part in fuzzer.servers}
    started = time.monotonic()
    for index in range(NUM_REQUESTS):
        seeds = page if index % 4 == 3 else apis
        sent = seeds[int(rng.integers(len(seeds)))]
        fuzzer.send(with_damaged_image(sent, rng) if rng.random() < 0.1 else mutate(sent, rng))
        if index % 50 == 49:
            for part, server in fuzzer.servers.items():
                sizes[part].append(resident_bytes(server.process.pid))
            if NUM_REQUESTS > 1000 and index % 500 == 499:
                took_s = time.monotonic() - started
                print(f"{index + 1} requests in {took_s:.0f} s, {len(fuzzer.faults)} faults", flush=True)
    growth = {part: (list_[-1] - list_[len(list_) // 2]) / 2**20 for part, list_ in sizes.items() if len(list_) > 4}
    print(f"\n{NUM_REQUESTS:,} damaged requests: {dict(sorted(fuzzer.outcomes.items()))}; growth in MB: {growth}")
    assert not fuzzer.faults, f"{len(fuzzer.faults)} faults:\n" + "\n".join(fuzzer.faults[:20])
    assert all(server.process.poll() is None for server in fuzzer.servers.values())
    assert all(2**20 * value < GROWTH_BYTES for value in growth.values()), growth
    failures = [line for server in fuzzer.servers.values() for line in _failures(server.log)]
    assert not failures, failures[:10]
    wait_until(lambda: queue_length(parts.worker.url) == 0, what="all slots free")
    assert llava_answer(parts.controller.url, body) == before


def _failures(log: Path) -> list[str]:
    """Log lines about a failure of the program, not of a request."""
    marks = ('"level": "error"', "Traceback (most recent", "web UI handler failed", "was never awaited")
    return [line for line in log.read_text(errors="replace").splitlines() if any(mark in line for mark in marks)]
