"""llama.cpp as a peer: its server for one user, and its batched C API for several, each in its own process."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from babydoctor.bench.serve_figures import BenchQuestion, Figures, Timing, summarize
from babydoctor.bench.serve_http import free_port, running_server
from babydoctor.bench.serve_model import build_prompt
from babydoctor.schema import UserError

INSTALL = "pip install --no-cache-dir 'llama-cpp-python[server]'"
"""Without the cache, in which ``scripts/test.sh`` may have left a build without optimization."""

_MODULES = ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings", "gguf")

_OUR_DEFAULTS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def check_installed() -> None:
    """Raise ``UserError`` if llama-cpp-python, its server or the gguf package is not installed."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"bench peers needs llama-cpp-python with its server and the gguf package, and {missing[0]} is missing: "
            f"{INSTALL} gguf"
        )


def is_optimized() -> bool:
    """False if llama.cpp's products record that they were compiled as ``scripts/test.sh`` does, to save time."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None, "checked by check_installed"
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(spec.origin).parent / "lib")
    return not any(b" -O1 " in library.read_bytes() for library in folder.glob("*ggml-cpu*"))


class Server:
    """llama-cpp-python's server: one request at a time, over HTTP."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid = url, pid

    def measure(self, questions: Sequence[BenchQuestion], max_new_tokens: int) -> Figures:
        """Ask the questions one after the other."""
        with httpx.Client(timeout=120, trust_env=False) as client:
            start = time.perf_counter()
            timings = [ask(client, self.url, question, max_new_tokens) for question in questions]
            return summarize(1, timings, time.perf_counter() - start)


def ask(client: httpx.Client, url: str, question: BenchQuestion, max_new_tokens: int) -> Timing:
    """Send one question over OpenAI's API and time its answer.

    Raises:
        UserError: the server answered with an error, or the answer is shorter than asked.
    """
    image = "data:image/png;base64," + base64.b64encode(question.image).decode()
    body = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image}},
                    {"type": "text", "text": question.text},
                ],
            }
        ],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "repeat_penalty": 1.0,
        "stream": True,
    }
    start = time.perf_counter()
    first, reason = None, ""
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise UserError(f"llama.cpp's server answered {response.status_code}: {response.read()[:300]!r}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            if first is None and choice["delta"].get("content"):
                first = time.perf_counter() - start
            reason = choice["finish_reason"] or reason
    end = time.perf_counter() - start
    if first is None or reason != "length":
        raise UserError(f"llama.cpp's server ended an answer with {reason!r} instead of {max_new_tokens} tokens")
    return Timing(first, end, max_new_tokens)


@contextmanager
def running_llama_server(folder: Path, log: Path, *, context: int, num_threads: int) -> Iterator[Server]:
    """Run llama-cpp-python's server on an export.

    Args:
        folder: what ``babydoctor export --format gguf`` writes.
    """
    port = free_port("llama.cpp")
    settings = {
        "model": folder / "model.gguf",
        "clip_model_path": folder / "mmproj-cls-last.gguf",
        "chat_format": "mtmd",
        "n_ctx": context,
        "n_threads": num_threads,
        "n_threads_batch": num_threads,
        "logits_all": "false",  # by default it computes the logits of all positions of the prompt
        "verbose": "false",
        "host": "127.0.0.1",
        "port": port,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llama_cpp.server", *words]
    url = f"http://127.0.0.1:{port}"
    with running_server("llama.cpp's server", command, f"{url}/v1/models", log, _environment()) as pid:
        yield Server(url, pid)


class Batched:
    """llama.cpp's batched C API in the process of ``babydoctor.bench.peers.batched``."""

    def __init__(self, process: subprocess.Popen[str], log: Path, num_users: int) -> None:
        self._process, self._log, self._num_users = process, log, num_users
        self.pid = process.pid
        self._read()  # the model is loaded
        self.prompt_tokens: dict[str, int] = {}
        """Length of each prompt that it computed."""

    def measure(self, questions: Sequence[BenchQuestion], max_new_tokens: int) -> Figures:
        """Let the users work through the questions."""
        return summarize(self._num_users, *self._ask(questions, max_new_tokens))

    def _ask(self, questions: Sequence[BenchQuestion], max_new_tokens: int) -> tuple[list[Timing], float]:
        asked = [
            {"prompt": build_prompt(question.text), "image": base64.b64encode(question.image).decode()}
            for question in questions
        ]
        assert self._process.stdin is not None
        start = time.perf_counter()
        self._process.stdin.write(json.dumps({"questions": asked, "max_new_tokens": max_new_tokens}) + "\n")
        self._process.stdin.flush()
        answers = self._read()
        wall_s = time.perf_counter() - start
        self.prompt_tokens |= {questions[answer["number"]].text: answer["prompt_tokens"] for answer in answers}
        return [Timing(row["first_token_s"], row["last_token_s"], len(row["tokens"])) for row in answers], wall_s

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"llama.cpp's batched program ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)


@contextmanager
def running_batched(folder: Path, log: Path, *, num_users: int, context: int, num_threads: int) -> Iterator[Batched]:
    """Run the batched program on an export; ``context``: tokens of each user."""
    options = {"users": num_users, "context": context, "threads": num_threads}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "babydoctor.bench.peers.batched", str(folder), *words]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment()
        )
    try:
        yield Batched(process, log, num_users)
    finally:
        process.kill()
        process.communicate()


def _environment() -> dict[str, str]:
    """The environment without the way of waiting that this package's command line sets for itself."""
    return {name: value for name, value in os.environ.items() if name not in _OUR_DEFAULTS}
