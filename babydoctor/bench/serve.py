"""``babydoctor bench serve``: how fast a worker answers, over HTTP as users see it, or the engine alone.

Users send a question about an image of their own, wait for the whole answer and send the next one. Every image and
every question is another one, so nothing but the template's system prompt can be reused.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.bench.measure import matmul_flops_per_s, memory_bytes_per_s, tensor_bytes
from babydoctor.bench.serve_model import IMAGE_SIZE, build_model, build_prompt, build_tokenizer, write_run
from babydoctor.model.language_model import Quantization
from babydoctor.schema import UserError
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.streaming import AnswerDelta
from babydoctor.serve.client import open_llava_stream
from babydoctor.serve.server import bind

if TYPE_CHECKING:
    from babydoctor.engine.settings import StartHook
    from babydoctor.model.babydoctor import BabyDoctor

_FINDINGS = ("an effusion", "a fracture", "a nodule", "free air", "a haematoma", "consolidation", "a shift", "a cyst")
_PLACES = ("left", "right", "upper", "lower", "central", "medial", "lateral", "basal")
READY_WITHIN_S = 300


@dataclass(frozen=True, slots=True)
class BenchQuestion:
    """One request: a question and an image file."""

    text: str
    image: bytes


@dataclass(frozen=True, slots=True)
class Timing:
    """What one user saw of one answer, in seconds since the request was sent."""

    first_token_s: float
    last_token_s: float
    num_tokens: int

    @property
    def per_token_s(self) -> float:
        return (self.last_token_s - self.first_token_s) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class Figures:
    """The result for one number of users."""

    num_users: int
    tokens_per_s: float
    requests_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    per_token_p50_s: float
    per_token_p95_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all users together while they read their answers, prompts not counted."""
        return self.num_users / self.per_token_p50_s if self.per_token_p50_s else 0.0


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """What memory must deliver for a step of decoding: all weights once, and each user's keys and values."""

    weight_bytes: int
    position_bytes: int
    num_positions: int

    def ceiling(self, num_users: int, bytes_per_s: float) -> float:
        """Tokens a second of ``num_users`` if nothing but memory's rate counted."""
        step_bytes = self.weight_bytes + num_users * self.position_bytes * self.num_positions
        return num_users * bytes_per_s / step_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """All that ``bench serve`` prints."""

    preset: str
    through: str
    device: str
    figures: tuple[Figures, ...]
    peak_bytes: int
    matmul_flops_per_s: float
    memory_bytes_per_s: float
    decode_cost: DecodeCost

    def share_of_ceiling(self, row: Figures) -> float:
        """Decoding's share of what memory allows."""
        return row.decode_tokens_per_s / self.decode_cost.ceiling(row.num_users, self.memory_bytes_per_s)


def build_questions(number: int, seed: int = 0) -> list[BenchQuestion]:
    """Distinct questions with distinct images, PNG of smooth noise."""
    from PIL import Image

    random = np.random.default_rng(seed)
    questions = []
    for index in range(number):
        finding, place = random.choice(_FINDINGS), random.choice(_PLACES)
        coarse = random.integers(0, 255, (28, 28, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(buffer, "PNG")
        text = f"In case {index} of {number}, is there {finding} on the {place} side? Say what you see and why."
        questions.append(BenchQuestion(text, buffer.getvalue()))
    return questions


def summarize(num_users: int, timings: list[Timing], wall_s: float) -> Figures:
    first = np.asarray([timing.first_token_s for timing in timings])
    each = np.asarray([timing.per_token_s for timing in timings])
    return Figures(
        num_users,
        sum(timing.num_tokens for timing in timings) / wall_s,
        len(timings) / wall_s,
        *np.percentile(first, (50, 95)).tolist(),
        *np.percentile(each, (50, 95)).tolist(),
    )


# Over HTTP.


async def ask(client: Any, url: str, model: str, question: BenchQuestion, max_new_tokens: int) -> Timing:
    """One request on the LLaVA protocol.

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
    """``num_users`` users work through the questions, each with one request at a time."""
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
    """Run a worker in its own process on a free port: its URL and process id.

    ``engine``: settings of its engine that replace the defaults.

    Raises:
        UserError: it did not become ready.
    """
    import httpx

    with bind("worker", "127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from babydoctor.cli.main import main; main()", "worker", str(run)]
    settings = ["worker.controller=null", f"worker.port={port}"]
    settings += [f"engine.{name}={json.dumps(value)}" for name, value in (engine or {}).items()]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *settings], stdout=file, stderr=file, env=_without_keys())
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the worker did not start:\n{log.read_text(errors='replace')[-2000:]}")
            try:
                if httpx.get(f"{url}/readyz", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url, process.pid
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


# The engine alone.


def drive_engine(engine: Any, prepared: list[Any], num_users: int) -> Figures:
    """As ``drive``, without HTTP: requests are ready-made arrays."""
    timings: list[Timing] = []
    left, lock = iter(prepared), threading.Lock()

    def user() -> None:
        while True:
            with lock:
                request = next(left, None)
            if request is None:
                return
            done = engine.submit(request).result()
            timings.append(Timing(done.first_token_s, done.total_s, done.usage.completion_tokens))

    users = [threading.Thread(target=user) for _ in range(num_users)]
    start = time.perf_counter()
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    return summarize(num_users, timings, time.perf_counter() - start)


def prepare(questions: list[BenchQuestion], model: BabyDoctor, tokenizer: Any, max_new_tokens: int) -> list[Any]:
    """Engine requests for the questions."""
    from babydoctor.conversation import split_images
    from babydoctor.data.tokens import encode
    from babydoctor.engine.request import GenerationRequest, ImageInput
    from babydoctor.imaging.load import load_image
    from babydoctor.imaging.preprocess import ImageSettings, to_pixels

    settings = ImageSettings(IMAGE_SIZE, "pad", (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
    requests = []
    for index, question in enumerate(questions):
        example = encode(split_images(build_prompt(question.text)), tokenizer, model.num_patches)
        image = ImageInput(f"{id(questions)}-{index}", to_pixels(load_image(question.image), settings))
        requests.append(
            GenerationRequest(example.input_ids, example.image_mask, (image,), max_new_tokens, stop=("</s>",))
        )
    return requests


# Both.


def run_bench(
    preset: str,
    folder: Path,
    *,
    users: tuple[int, ...] = (1, 16),
    requests_per_user: int = 4,
    max_new_tokens: int = 64,
    rounds: int = 3,
    engine_only: bool = False,
    nf4: bool = False,
    engine: Mapping[str, Any] | None = None,
    on_engine_start: StartHook | None = None,
    device: str = "cpu",
    on_event: Any = lambda text: None,
) -> Report:
    """Measure ``rounds`` times for each number of users and keep the fastest round.

    Args:
        folder: an empty folder for the model's files.
        nf4: a 4-bit language model; measured, like ``7b``, without HTTP.
        engine: settings of the engine that replace the defaults.
        on_engine_start: see ``EngineSettings.on_start``; for an engine in this process.
        on_event: told what is going on.

    Raises:
        UserError: the preset cannot run here.
    """
    import torch

    if preset == "7b" and not device.startswith("cuda"):
        raise UserError("--preset 7b needs a CUDA GPU with 16 GB or more; --preset mini runs on any machine")
    on_event(f"building {preset} with random weights")
    batches = [
        (number, build_questions(max(number * requests_per_user, 8), seed=17 * round_ + number))
        for round_ in range(rounds)
        for number in users
    ]
    tokenizer = build_tokenizer([question.text for _, questions in batches for question in questions])
    model = build_model(preset, device, Quantization() if nf4 else None)
    cost = decode_cost(model, prepare(batches[0][1][:1], model, tokenizer, max_new_tokens)[0])
    bandwidth = memory_bytes_per_s(device)
    rate = matmul_flops_per_s(device)
    results: list[Figures] = []
    engine_only = engine_only or nf4 or preset == "7b"
    if engine_only:
        from babydoctor.engine.engine import Engine
        from babydoctor.engine.settings import build_settings

        with Engine(model, tokenizer, build_settings(engine or {}, on_start=on_engine_start)) as measured:
            warm_up = prepare(build_questions(2, seed=999), model, tokenizer, 4)
            drive_engine(measured, warm_up, 2)
            for number, questions in batches:
                on_event(f"{number} users")
                results.append(drive_engine(measured, prepare(questions, model, tokenizer, max_new_tokens), number))
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes(os.getpid())
    else:
        run = write_run(model, tokenizer, folder, preset)
        del model
        on_event("starting the worker")
        with running_worker(run, folder / "worker.log", engine) as (url, pid):
            asyncio.run(drive(url, preset, 2, build_questions(2, seed=999), 4))
            for number, questions in batches:
                on_event(f"{number} users")
                results.append(asyncio.run(drive(url, preset, number, questions, max_new_tokens)))
            peak = peak_rss_bytes(pid)
    rate = max(rate, matmul_flops_per_s(device))
    best = tuple(
        max((figures for figures in results if figures.num_users == number), key=lambda figures: figures.tokens_per_s)
        for number in users
    )
    through = "engine alone" if engine_only else "worker over HTTP"
    bandwidth = max(bandwidth, memory_bytes_per_s(device))
    return Report(f"{preset} {'NF4' if nf4 else 'bf16'}", through, device, best, peak, rate, bandwidth, cost)


def decode_cost(model: BabyDoctor, request: Any) -> DecodeCost:
    """What a step reads, with the keys and values of a request that is half answered."""
    from babydoctor.engine.kv_cache import slot_bytes
    from babydoctor.engine.settings import kv_shape, preferred_kv_dtype

    language_model = model.language_model
    embedding = language_model.model.embed_tokens.weight
    dtype = preferred_kv_dtype(language_model.dtype, language_model.device)
    return DecodeCost(
        weight_bytes=tensor_bytes(language_model) - embedding.numel() * embedding.element_size(),
        position_bytes=slot_bytes(*kv_shape(language_model.config), 1, dtype),
        num_positions=len(request.input_ids) + request.max_new_tokens // 2,
    )


def peak_rss_bytes(pid: int) -> int:
    """Most memory that a process ever held (Linux); 0 where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
