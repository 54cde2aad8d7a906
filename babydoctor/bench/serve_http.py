"""``bench serve`` over HTTP: a worker in its own process, and users who ask it on LLaVA's API."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from babydoctor.bench.serve_figures import BenchQuestion, Figures, Timing, summarize
from babydoctor.bench.serve_model import build_prompt
from babydoctor.schema import UserError
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.streaming import AnswerDelta
from babydoctor.serve.client import open_llava_stream
from babydoctor.serve.server import bind

READY_WITHIN_S = 300


async def ask(client: Any, url: str, model: str, question: BenchQuestion, max_new_tokens: int) -> Timing:
    """Send one request over the LLaVA API and time its answer.

    Raises:
        UserError: the worker answered with an error.
    """
    body = {
        "model": model,
        "prompt": build_prompt(question.text),
        "images": [base64.b64encode(question.image).decode()],
        "temperature": 0,
        "max_new_tokens": max_new_tokens,
        "stop": "</s>",
    }
    start = time.perf_counter()
    first, answer = None, AnswerDelta()
    try:
        async with open_llava_stream(client, body, url=url) as stream:
            async for delta in stream:
                if first is None and delta.text:
                    first = time.perf_counter() - start
                answer = answer.then(delta)
    except ApiError as error:
        answer = AnswerDelta(error=error)
    end = time.perf_counter() - start
    if answer.error is not None or first is None:
        reason = answer.error.message if answer.error is not None else "nothing"
        raise UserError(f"the worker answered: {reason[:300]}", code="server_refused")
    return Timing(first, end, answer.usage.completion_tokens if answer.usage is not None else max_new_tokens)


async def drive(url: str, model: str, num_users: int, questions: list[BenchQuestion], max_new_tokens: int) -> Figures:
    """Let ``num_users`` users work through the questions, each with one request at a time."""
    import httpx

    left = iter(questions)
    timings: list[Timing] = []

    async def user(client: httpx.AsyncClient) -> None:
        for question in left:
            timings.append(await ask(client, url, model, question, max_new_tokens))

    limits = httpx.Limits(max_connections=num_users)
    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
        start = time.perf_counter()
        await asyncio.gather(*(user(client) for _ in range(num_users)))
        wall_s = time.perf_counter() - start
    return summarize(num_users, timings, wall_s)


@contextmanager
def running_worker(run: Path, log: Path, engine: Mapping[str, Any] | None = None) -> Iterator[tuple[str, int]]:
    """Run a worker in its own process on a free port. Yields its URL and process id.

    Args:
        engine: settings of its engine that replace the defaults.

    Raises:
        UserError: the worker did not become ready.
    """
    port = free_port("worker")
    command = [sys.executable, "-c", "from babydoctor.cli.main import main; main()", "worker", str(run)]
    command += ["worker.controller=null", f"worker.port={port}"]
    command += [f"engine.{name}={json.dumps(value)}" for name, value in (engine or {}).items()]
    url = f"http://127.0.0.1:{port}"
    with running_server("the worker", command, f"{url}/readyz", log, _without_keys()) as pid:
        yield url, pid


def free_port(name: str) -> int:
    """A port on the loopback address that nothing listens on."""
    with bind(name, "127.0.0.1", 0) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def running_server(
    name: str, command: Sequence[str], ready_url: str, log: Path, environment: Mapping[str, str]
) -> Iterator[int]:
    """Run a server in its own process until the block ends. Yields its process id once ``ready_url`` answers 200.

    Raises:
        UserError: the server did not become ready. The message ends with its output, which is in ``log``.
    """
    import httpx

    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            try:
                if httpx.get(ready_url, timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _without_keys() -> dict[str, str]:
    from babydoctor.serve.settings import KEYS_FILE_VARIABLE, KEYS_VARIABLE

    return {name: value for name, value in os.environ.items() if name not in (KEYS_VARIABLE, KEYS_FILE_VARIABLE)}
