"""``babydoctor bench serve``: speed of a worker over HTTP, as users see it, or of the engine alone.

Each user sends a question about an image, waits for the whole answer, and sends the next one. No image and no question
occurs twice, so only the template's system prompt can be reused.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.bench.measure import matmul_flops_per_s, memory_bytes_per_s, peak_rss_bytes, tensor_bytes
from babydoctor.bench.serve_figures import (
    BenchQuestion,
    DecodeCost,
    Figures,
    Report,
    Timing,
    build_questions,
    summarize,
)
from babydoctor.bench.serve_http import drive, running_worker
from babydoctor.bench.serve_model import IMAGE_SIZE, build_model, build_prompt, build_tokenizer, write_run
from babydoctor.model.nf4 import Quantization
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from babydoctor.engine.settings import EngineSettings, StartHook
    from babydoctor.model.babydoctor import BabyDoctor

CPU_BYTES_7B = {"bf16": 17e9, "nf4": 7e9}
"""Memory for the 7b preset on a CPU: weights, the largest one while it is copied, and a KV cache."""

Batches = Sequence[tuple[int, list[BenchQuestion]]]
"""A number of users and their questions, for each measurement."""


def drive_engine(engine: Any, prepared: list[Any], num_users: int) -> Figures:
    """Like ``drive``, without HTTP: ``prepared`` holds requests whose arrays are ready."""
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


def run_bench(
    preset: str,
    folder: Path,
    *,
    users: tuple[int, ...] = (1, 16),
    requests_per_user: int = 4,
    max_new_tokens: int = 64,
    prompt_tokens: int = 0,
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
        prompt_tokens: see ``build_questions``.
        nf4: use a 4-bit language model. Like ``7b``, it is measured without HTTP.
        engine: settings of the engine that replace the defaults.
        on_engine_start: see ``EngineSettings.on_start``; used for an engine in this process.
        on_event: called with a line of progress.

    Raises:
        UserError: the preset cannot run here.
    """
    from babydoctor.engine.settings import build_settings

    if preset == "7b" and not device.startswith("cuda"):
        _check_memory(nf4=nf4)
    on_event(f"building {preset} with random weights")
    fewest = 8 if preset == "mini" else 1  # on a CPU, 7B takes a minute for each
    batches = [
        (
            number,
            build_questions(max(number * requests_per_user, fewest), 17 * round_ + number, prompt_tokens=prompt_tokens),
        )
        for round_ in range(rounds)
        for number in users
    ]
    tokenizer = build_tokenizer([question.text for _, questions in batches for question in questions])
    model = build_model(preset, device, Quantization() if nf4 else None)
    settings = build_settings(engine or {}, on_start=on_engine_start, own_weights=True)
    cost = decode_cost(model, prepare(batches[0][1][:1], model, tokenizer, max_new_tokens)[0], settings)
    bandwidth, rate = memory_bytes_per_s(device), matmul_flops_per_s(device)
    engine_only = engine_only or nf4 or preset == "7b"
    if engine_only:
        results, peak = _bench_engine(model, tokenizer, settings, batches, max_new_tokens, on_event)
    else:
        run = write_run(model, tokenizer, folder, preset)
        del model
        results, peak = _bench_worker(run, folder / "worker.log", preset, engine, batches, max_new_tokens, on_event)
    best = tuple(
        max((figures for figures in results if figures.num_users == number), key=lambda figures: figures.tokens_per_s)
        for number in users
    )
    through = "engine alone" if engine_only else "worker over HTTP"
    # The peaks are measured twice, because other programs may slow down one of the measurements.
    bandwidth, rate = max(bandwidth, memory_bytes_per_s(device)), max(rate, matmul_flops_per_s(device))
    precision = "NF4" if nf4 else "bf16"
    if settings.weights:
        precision = f"{settings.weights} from {precision}"
    return Report(f"{preset} {precision}", through, device, best, peak, rate, bandwidth, cost)


def _check_memory(*, nf4: bool) -> None:
    """Raise ``UserError`` if this machine has too little free memory for a 7B model and a small KV cache."""
    from babydoctor.engine.linear import available_memory_bytes

    needed, free = CPU_BYTES_7B["nf4" if nf4 else "bf16"], available_memory_bytes()
    if needed > free:
        raise UserError(
            f"--preset 7b{' --nf4' if nf4 else ''} needs {needed / 1e9:.0f} GB of free memory on a CPU, and "
            f"{free / 1e9:.1f} GB are free; close other programs, or choose {'' if nf4 else '--nf4 or '}--preset mini"
        )


def _bench_engine(
    model: BabyDoctor, tokenizer: Any, settings: EngineSettings, batches: Batches, max_new_tokens: int, on_event: Any
) -> tuple[list[Figures], int]:
    """The figures of each batch, and the most bytes in use: the GPU's, or this process's on the CPU."""
    import torch

    from babydoctor.engine.engine import Engine

    results = []
    with Engine(model, tokenizer, settings) as engine:
        drive_engine(engine, prepare(build_questions(2, seed=999), model, tokenizer, 4), 2)  # warm up
        for number, questions in batches:
            on_event(f"{number} users")
            results.append(drive_engine(engine, prepare(questions, model, tokenizer, max_new_tokens), number))
    is_cuda = model.language_model.device.type == "cuda"
    return results, torch.cuda.max_memory_allocated() if is_cuda else peak_rss_bytes(os.getpid())


def _bench_worker(
    run: Path,
    log: Path,
    name: str,
    engine: Mapping[str, Any] | None,
    batches: Batches,
    max_new_tokens: int,
    on_event: Any,
) -> tuple[list[Figures], int]:
    """The figures of each batch, and the most bytes that the worker's process held."""
    on_event("starting the worker")
    results = []
    with running_worker(run, log, engine) as (url, pid):
        asyncio.run(drive(url, name, 2, build_questions(2, seed=999), 4))  # warm up
        for number, questions in batches:
            on_event(f"{number} users")
            results.append(asyncio.run(drive(url, name, number, questions, max_new_tokens)))
        return results, peak_rss_bytes(pid)


def decode_cost(model: BabyDoctor, request: Any, settings: EngineSettings) -> DecodeCost:
    """What a decoding step reads when ``request`` is halfway through its answer."""
    import torch

    from babydoctor.engine.backend import uses_cpu_operator
    from babydoctor.engine.kv_cache import slot_bytes
    from babydoctor.engine.settings import kv_shape, preferred_kv_dtype

    language_model = model.language_model
    embedding = language_model.model.embed_tokens.weight
    dtype = preferred_kv_dtype(language_model.dtype, language_model.device)
    if uses_cpu_operator(language_model, settings):
        dtype = torch.bfloat16
    if settings.weights == "int8":
        linears: list[Any] = [part for part in language_model.modules() if isinstance(part, torch.nn.Linear)]
        weight_bytes = sum(linear.in_features * linear.out_features for linear in linears)
    else:
        weight_bytes = tensor_bytes(language_model) - embedding.numel() * embedding.element_size()
    return DecodeCost(
        weight_bytes=weight_bytes,
        position_bytes=slot_bytes(*kv_shape(language_model.config), 1, dtype),
        num_positions=len(request.input_ids) + request.max_new_tokens // 2,
    )
