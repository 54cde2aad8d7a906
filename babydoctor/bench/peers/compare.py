"""``babydoctor bench peers``: our worker and llama.cpp on the same weights, in turn within each round.

A shared machine changes its speed within minutes, so ratios are taken within a round, and their median counts.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from babydoctor.bench.measure import peak_rss_bytes, processor_name
from babydoctor.bench.peers.llama_cpp import (
    INSTALL,
    Batched,
    Server,
    check_installed,
    is_optimized,
    running_batched,
    running_llama_server,
)
from babydoctor.bench.serve_figures import BenchQuestion, Figures, build_questions
from babydoctor.bench.serve_http import drive, running_worker
from babydoctor.bench.serve_model import build_model, build_prompt, build_tokenizer, write_run
from babydoctor.markers import markdown_table
from babydoctor.schema import UserError


@dataclass(frozen=True)
class Weights:
    """A kind of weights: the worker's ``engine.weights``, the export's ``--dtype``, and its name in the table."""

    engine: str | None
    dtype: str
    label: str


WEIGHTS = {"bf16": Weights(None, "bfloat16", "bf16"), "int8": Weights("int8", "q8_0", "int8, q8_0")}

WARMUP_QUESTIONS, WARMUP_TOKENS = 2, 4

CONTEXT_STEP = 256
"""llama.cpp rounds the context up to a multiple of this."""


class OwnWorker:
    """Our worker, asked over LLaVA's API."""

    def __init__(self, url: str, pid: int, model: str) -> None:
        self.url, self.pid, self.model = url, pid, model

    def measure(self, questions: Sequence[BenchQuestion], max_new_tokens: int, num_users: int) -> Figures:
        return asyncio.run(drive(self.url, self.model, num_users, list(questions), max_new_tokens))


@dataclass
class Match:
    """Our worker and its peer for one number of users and one kind of weights, and their figures by round."""

    num_users: int
    weights: Weights
    worker: OwnWorker
    peer: Server | Batched
    ours: list[Figures]
    theirs: list[Figures]

    def play(self, questions: Sequence[BenchQuestion], max_new_tokens: int) -> tuple[Figures, Figures]:
        """Ask both the same questions, one program after the other."""
        ours = self.worker.measure(questions, max_new_tokens, self.num_users)
        return ours, self.peer.measure(questions, max_new_tokens)

    def row(self) -> list[str]:
        """Cells of the table: medians over the rounds, and the peaks of memory."""
        ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return [
            str(self.num_users),
            self.weights.label,
            f"{_median(self.ours, 'tokens_per_s'):.0f}",
            f"{_median(self.theirs, 'tokens_per_s'):.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{_median(self.ours, 'first_token_p50_s'):.3f}",
            f"{_median(self.theirs, 'first_token_p50_s'):.3f}",
            f"{peak_rss_bytes(self.worker.pid) / 2**20:.0f}",
            f"{peak_rss_bytes(self.peer.pid) / 2**20:.0f}",
        ]


HEAD = (
    "users",
    "weights, ours and llama.cpp's",
    "tok/s",
    "llama.cpp",
    "ratio (range)",
    "first token p50 [s]",
    "llama.cpp",
    "peak MiB",
    "llama.cpp",
)


def compare(
    folder: Path,
    *,
    preset: str = "mini",
    users: Sequence[int] = (1, 16),
    weights: Sequence[str] = tuple(WEIGHTS),
    requests_per_user: int = 4,
    max_new_tokens: int = 64,
    rounds: int = 5,
    on_progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> str:
    """Measure and return a Markdown table with a line on how it was measured.

    Args:
        folder: an empty folder for the model's files and logs.
        on_progress: called with a description and the measurements that are done and all of them.

    Raises:
        UserError: llama-cpp-python is missing, a program did not start, or it refused a question.
    """
    check_installed()
    for name in weights:
        if name not in WEIGHTS:
            raise UserError(f"--weights {name!r} is not one of {', '.join(WEIGHTS)}")
    asked = [
        {number: build_questions(max(number * requests_per_user, 8), 17 * turn + number) for number in users}
        for turn in range(rounds)
    ]
    warmup = build_questions(WARMUP_QUESTIONS, seed=999)
    every = [*warmup, *(question for turn in asked for questions in turn.values() for question in questions)]
    kinds = [WEIGHTS[name] for name in weights]
    lengths, run = _write_model(preset, folder, every, kinds)
    context = -(-(max(lengths.values()) + max_new_tokens) // CONTEXT_STEP) * CONTEXT_STEP
    with ExitStack() as stack:
        matches = list(_matches(stack, run, folder, users, kinds, context))
        for match in matches:
            match.play(warmup, WARMUP_TOKENS)
        done = 0
        for turn in asked:
            for match in matches:
                ours, theirs = match.play(turn[match.num_users], max_new_tokens)
                match.ours.append(ours)
                match.theirs.append(theirs)
                done += 1
                on_progress("Measurements", done, rounds * len(matches))
        _check_prompts(matches, lengths)
        return _table(matches, preset, rounds, max_new_tokens, list(lengths.values()))


def _write_model(
    preset: str, folder: Path, questions: Sequence[BenchQuestion], weights: Sequence[Weights]
) -> tuple[dict[str, int], Path]:
    """Write a run with random weights and its exports. Returns each question's prompt length and the run's folder."""
    from babydoctor.conversation import split_images
    from babydoctor.data.tokens import encode
    from babydoctor.interop.export import export_run

    tokenizer, model = build_tokenizer([question.text for question in questions]), build_model(preset)
    run = write_run(model, tokenizer, folder, preset)
    for kind in weights:
        export_run(run, folder / kind.dtype, format="gguf", dtype=kind.dtype)
    prompts = {question.text: split_images(build_prompt(question.text)) for question in questions}
    return {text: len(encode(prompt, tokenizer, model.num_patches)) for text, prompt in prompts.items()}, run


def _matches(
    stack: ExitStack, run: Path, folder: Path, users: Sequence[int], weights: Sequence[Weights], context: int
) -> Iterator[Match]:
    """Start all programs and pair them."""
    num_threads = torch.get_num_threads()
    for kind in weights:
        engine = {} if kind.engine is None else {"weights": kind.engine}
        log = folder / f"worker-{kind.dtype}.log"
        worker = OwnWorker(*stack.enter_context(running_worker(run, log, engine)), run.name)
        for number in users:
            log = folder / f"llama-{kind.dtype}-{number}.log"
            options = {"context": context, "num_threads": num_threads}
            peer: Server | Batched
            if number == 1:
                peer = stack.enter_context(running_llama_server(folder / kind.dtype, log, **options))
            else:
                peer = stack.enter_context(running_batched(folder / kind.dtype, log, num_users=number, **options))
            yield Match(number, kind, worker, peer, [], [])


def _check_prompts(matches: Sequence[Match], lengths: dict[str, int]) -> None:
    """Both programs must have read prompts of the same length, or the comparison is worth nothing."""
    for match in matches:
        if isinstance(match.peer, Batched):
            for text, length in match.peer.prompt_tokens.items():
                assert length == lengths[text], f"{text!r}: {length} tokens in llama.cpp, {lengths[text]} here"


def _table(matches: Sequence[Match], preset: str, rounds: int, max_new_tokens: int, lengths: Sequence[int]) -> str:
    import llama_cpp

    ordered = sorted(matches, key=lambda match: match.num_users)
    note = (
        f"{preset} model with random weights on {processor_name()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, llama-cpp-python {llama_cpp.__version__}. Prompts of {min(lengths)} to {max(lengths)} "
        f"tokens with an image, {max_new_tokens} new tokens. Medians of {rounds} rounds, in which the programs take "
        "turns; ratios are within a round. Our worker is asked over HTTP; llama.cpp is its Python server over HTTP "
        "for one user and its batched C API without HTTP for several."
    )
    if not is_optimized():
        note += f" llama.cpp is compiled without full optimization, so its figures are too low: {INSTALL}."
    return "\n".join([*markdown_table(HEAD, [match.row() for match in ordered]), "", note])


def _median(rows: Sequence[Figures], name: str) -> float:
    return statistics.median(getattr(row, name) for row in rows)
