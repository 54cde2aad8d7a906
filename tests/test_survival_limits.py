"""Attacks on memory, connections and logs of real servers, each with the figure from before the limit."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from collections.abc import Iterator

import pytest
import requests
from helpers.serving import Server, start_controller, stop_all, wait_until

from babydoctor.serve.logs import RateLimit
from babydoctor.serve.page import session as page_session
from babydoctor.serve.page import uploads as page_uploads
from babydoctor.serve.page.scan import Scan
from babydoctor.serve.page.session import Sessions
from babydoctor.serve.page.texts import PageError

HEAD_S = 1.0


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = (
        f"limits.head_timeout_s={HEAD_S}",
        "limits.max_connections=40",
        "limits.max_held_bytes=1000000",
        "limits.body_timeout_s=20",
    )
    server = start_controller(tmp_path_factory.mktemp("limits") / "log", *settings)
    try:
        wait_until(lambda: requests.get(f"{server.url}/healthz", timeout=5).ok, 180, "the controller")
        yield server
    finally:
        stop_all([server])


def connect(server: Server, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60)
    sock.sendall(data)
    return sock


def is_closed(sock: socket.socket) -> bool:
    """Wait until the other side closes."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def gauge(server: Server, name: str) -> float:
    text = requests.get(f"{server.url}/metrics", headers={"Connection": "close"}, timeout=10).text
    match = re.search(rf"^babydoctor_{name} (\S+)", text, re.M)
    return float(match.group(1)) if match else 0.0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "idle"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", "half_sent"),
        (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /heal", "half_sent"),
    ],
)
def test_idle_and_half_sent_connections_are_closed_and_counted(controller: Server, data: bytes, reason: str) -> None:
    """Before: uvicorn kept all three open for as long as the client did."""
    name = f'connections_ended_total{{reason="{reason}"}}'
    before = gauge(controller, name)
    socks = [connect(controller, data) for _ in range(10)]
    assert all(map(is_closed, socks))
    wait_until(lambda: gauge(controller, name) >= before + 10, 30, "the count")
    wait_until(lambda: gauge(controller, "connections") <= 1, 30, "the end of all")


def test_a_slow_header_has_one_deadline(controller: Server) -> None:
    """Single bytes that trickle in do not restart the deadline."""
    sock = connect(controller, b"GET /healthz HTTP/1.1\r\n")
    started = time.monotonic()
    with pytest.raises(ConnectionError):
        while time.monotonic() - started < 60:
            sock.sendall(b"X-A: b\r\n")
            time.sleep(0.1)


def test_a_flood_of_idle_connections_does_not_block_others(controller: Server) -> None:
    """Before: 1,024 of them used up all file handles of the process."""
    socks = [connect(controller) for _ in range(120)]
    try:
        assert requests.get(f"{controller.url}/healthz", timeout=10).ok
        assert gauge(controller, "connections") <= 40
        assert gauge(controller, 'connections_ended_total{reason="crowded"}') >= 80
    finally:
        for sock in socks:
            sock.close()


def test_bodies_count_while_they_arrive(controller: Server) -> None:
    """Before: only finished bodies counted, so any number of clients could each hold 32 MB for 30 s."""
    head = b"POST /worker_generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900000\r\n\r\n"
    socks = [connect(controller, head + b" " * 400_000) for _ in range(5)]
    wait_until(lambda: gauge(controller, "held_bytes") >= 800_000, 30, "two bodies")
    answers = []
    for sock in socks:
        sock.settimeout(2)
        try:
            answers.append(sock.recv(200)[:12])
        except TimeoutError:
            answers.append(b"waits")
    assert answers.count(b"HTTP/1.1 429") >= 3, answers
    assert gauge(controller, "held_bytes") <= 1_000_000
    for sock in socks:
        sock.close()
    wait_until(lambda: gauge(controller, "held_bytes") == 0, 30, "the release of all")


def test_paths_without_a_key_accept_small_bodies_only(controller: Server) -> None:
    """Before: 32 MB each, from anyone."""
    body = json.dumps({"worker_name": "http://127.0.0.1:9", "queue_length": 0, "x": "y" * 200_000})
    headers = {"Content-Type": "application/json"}
    assert requests.post(f"{controller.url}/register_worker", body, headers=headers, timeout=10).status_code == 413


def test_a_hundred_thousand_bad_requests_do_not_fill_the_log() -> None:
    """Before: one line each. Now the number of omitted lines is logged."""
    limit = RateLimit(per_s=10, burst=100)
    passed = []
    for index in range(100_000):
        record = logging.LogRecord("babydoctor.serve", logging.INFO, "", 0, "request", (), None)
        record.created = index / 10_000  # ten seconds
        if limit.filter(record):
            passed.append(getattr(record, "fields", {}).get("left_out", 0))
    assert 190 <= len(passed) <= 210 and sum(passed) + len(passed) >= 99_000
    assert limit.filter(logging.LogRecord("babydoctor.serve", logging.ERROR, "", 0, "request failed", (), None))


def test_sessions_of_the_web_ui_share_a_limit_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: 256 sessions of up to 128 MB each."""
    from PIL import Image

    monkeypatch.setattr(page_session, "MAX_BYTES", 10_000_000)
    sessions = Sessions()
    picture = Image.new("RGB", (1000, 1000))  # 3 MB
    for index in range(8):
        sessions.attach(f"c{index}", f"{index:032x}")
        sessions.get(f"c{index}").load(Scan(None, picture, {}))
        sessions.get(f"c{index}")
    assert len(sessions) == 3
    with pytest.raises(PageError):
        sessions.get("c0")
    assert sessions.get("c7").scan is not None


class _Request:
    """An upload that stops half-way."""

    def __init__(self, size: int, more: asyncio.Event) -> None:
        self._size, self._more = size, more

    async def stream(self):
        yield bytes(self._size)
        await self._more.wait()


def test_uploads_that_arrive_at_once_share_a_limit_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: each connection could hold 128 MB forever."""
    monkeypatch.setattr(page_uploads, "MAX_ARRIVING_BYTES", 1_000_000)

    async def arrive() -> list[object]:
        uploads, more = page_uploads.Uploads(), asyncio.Event()
        reading = [asyncio.ensure_future(uploads.read(_Request(400_000, more))) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        more.set()
        results = await asyncio.gather(*reading, return_exceptions=True)
        assert uploads._num_arriving == 0
        return results

    results = asyncio.run(arrive())
    assert [len(result) for result in results if isinstance(result, bytes)] == [400_000, 400_000]
    assert {result.code for result in results if isinstance(result, PageError)} == {"uploads_busy"}
