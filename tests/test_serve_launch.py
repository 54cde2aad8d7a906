"""``babydoctor serve``: all parts start, answer, and end when the launcher ends in any way."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from helpers.serving import free_port, png, stop_all, tiny_run, wait_until

from babydoctor.schema import UserError
from babydoctor.serve.client import Client
from babydoctor.serve.server import bind, local_url, reachable_url

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

UNNEEDED = frozenset({"bitsandbytes", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn"})
"""Packages that serving a model in bfloat16 or float32 does not use. Each takes 20 MB or more."""


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def serve(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }
    command = [
        sys.executable,
        "-c",
        "from babydoctor.cli.main import main; main()",
        "serve",
        str(tiny_run()),
        "--no-page",
    ]
    settings = ["controller.port=0", "worker.port=0", "engine.max_running=2", "worker.drain_s=5"]
    with log.open("wb") as file:
        # Background jobs of a shell ignore SIGINT, and children inherit that, but Ctrl-C must work here.
        return subprocess.Popen(
            [*command, *settings, *arguments],
            stdout=file,
            stderr=file,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def ready_url(process: subprocess.Popen[bytes], log: Path) -> str:
    def address() -> str | None:
        text = log.read_text()
        assert process.poll() is None, text
        return match.group(1) if (match := re.search(r"LLaVA API +(\S+)", text)) and "Ctrl-C" in text else None

    return wait_until(address, 90, "readiness")


def test_serve_answers_restarts_parts_and_leaves_no_process(tmp_path: Path):
    log = tmp_path / "log"
    process = serve(log, "--workers", "2")
    try:
        url = ready_url(process, log)
        parts = children(process.pid)
        assert len(parts) == 3
        with Client(url) as client:
            assert client.models() == ["tiny"]
            answer = client.ask_llava("tiny", "Which modality is this?", png())
            assert answer and client.ask_openai("tiny", "Which modality is this?", png()) == answer
        # Memory: the controller does without PyTorch, and a worker without what only training and evaluation need.
        assert packages_of(parts[0]).isdisjoint({"torch", *UNNEEDED}) and "torch" in packages_of(parts[1])
        assert packages_of(parts[1]).isdisjoint(UNNEEDED)
        # Other users of this machine cannot register a worker, because the launcher generates a secret.
        body = {
            "worker_name": "http://127.0.0.1:9",
            "check_heart_beat": True,
            "worker_status": {"model_names": ["evil"]},
        }
        assert requests.post(f"{url}/register_worker", json=body, timeout=60).status_code == 403

        os.kill(parts[-1], signal.SIGKILL)
        wait_until(lambda: "restarting it" in log.read_text(), 180, "the notice")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not any(map(is_alive, parts))
        # Each part ended by itself; none was killed.
        assert "Traceback" not in log.read_text() and '"error"' not in log.read_text()
    finally:
        process.kill()


def test_kill_9_of_the_launcher_ends_its_parts(tmp_path: Path):
    process = serve(tmp_path / "log")
    try:
        parts = wait_until(lambda: len(found := children(process.pid)) == 2 and found, 180, "the parts")
        # Kill it while parts are starting, which is the hardest moment.
        wait_until(lambda: len(open_modules(parts[1])) > 50, 180, "the worker's start")
    finally:
        process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, parts)), 180, "the parts' end")


def open_modules(pid: int) -> set[str]:
    """Shared libraries that a process has loaded, which show how far its start is."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {line.split()[-1] for line in maps.splitlines() if ".so" in line}


def packages_of(pid: int) -> set[str]:
    """Python packages whose shared libraries a process has loaded."""
    return {match[1] for path in open_modules(pid) if (match := re.search(r"/site-packages/([^/]+)/", path))}


def test_a_part_that_cannot_start_ends_all_with_a_reason(tmp_path: Path):
    log = tmp_path / "log"
    process = serve(log, "engine.max_context=999999")
    assert process.wait(90) == 2
    text = log.read_text()
    assert "engine.max_context=999999" in text and "worker 1 ended with status 2" in text and "Traceback" not in text


def test_a_taken_port_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        log = tmp_path / "log"
        process = serve(log, f"controller.port={port}")
        assert process.wait(60) == 2
    assert f"127.0.0.1:{port}" in log.read_text() and "controller.port=" in log.read_text()


def test_serving_other_machines_needs_keys(tmp_path: Path):
    log = tmp_path / "log"
    process = serve(log, "controller.host=0.0.0.0")
    assert process.wait(60) == 2
    assert "BABYDOCTOR_API_KEYS" in log.read_text() and "Traceback" not in log.read_text()


def test_the_registered_address_is_one_that_the_controller_reaches():
    with bind("worker", "127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert local_url(sock) == reachable_url(sock, "http://localhost:21001") == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=r"worker\.host=0\.0\.0\.0"):
            reachable_url(sock, "http://192.0.2.1:21001")
    with bind("worker", "0.0.0.0", 0) as sock:
        assert reachable_url(sock, "http://127.0.0.1:21001") == local_url(sock)
        assert "0.0.0.0" not in local_url(sock)
    with pytest.raises(UserError, match=r"check worker\.host"):
        bind("worker", "203.0.113.7", free_port())


def test_stopping_servers_that_have_ended_works():
    stop_all([])
