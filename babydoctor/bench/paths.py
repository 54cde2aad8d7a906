"""``babydoctor bench paths``: measure the gain of each fast path of training by switching it off.

Each entry of ``PATHS`` replaces one fast path by its plain version while a stage of the mini preset trains. Steps with
and without the path alternate, so a machine that becomes slower affects both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from babydoctor.bench import train as bench_train
from babydoctor.bench.train import BenchJob, measure_peak, prepare, run_steps
from babydoctor.config import TrainConfig
from babydoctor.data import layout, loader
from babydoctor.data.layout import AttentionLayout, PackedBatch, Span
from babydoctor.data.packing import pack
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.packed import decoder_layer
from babydoctor.plan.hardware import this_device
from babydoctor.schema import IGNORE_INDEX, Batch, Example


@dataclass(frozen=True)
class FastPath:
    """One fast path. ``overrides`` are settings that switch it off. ``off`` switches off the rest."""

    name: str
    without: str
    off: Callable[[], AbstractContextManager[Any]] = nullcontext
    overrides: tuple[str, ...] = ()
    change: Callable[[BabyDoctor], None] = lambda model: None


@dataclass(frozen=True)
class PathResult:
    """Medians over steps; sizes in bytes."""

    path: FastPath
    samples_per_s: float
    samples_per_s_without: float
    gain: float
    """Relative gain in speed, from pairs of steps. 0.5 means 50% faster."""
    peak_bytes: int
    peak_bytes_without: int


def square_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: AttentionLayout, window: int | None = None
) -> torch.Tensor:
    """``attend`` with one ``Q x T`` mask that hides other documents, instead of skipping them."""
    assert window is None, "the benchmark's models have no sliding window"
    mask = dense_mask(layout.spans, len(query), len(key)).to(query.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def dense_mask(spans: Sequence[Span], num_rows: int, num_keys: int) -> torch.Tensor:
    """Bool ``[Q, T]``: the keys that each query row may see."""
    mask = torch.zeros(num_rows, num_keys, dtype=torch.bool)
    for span in spans:
        own = span.keys.stop - span.keys.start
        mask[span.rows, : span.shared] = True
        mask[span.rows, span.keys] = torch.ones(span.num_rows, own, dtype=torch.bool).tril(own - span.num_rows)
    return mask


def loss_of_all_logits(self: BabyDoctor, batch: PackedBatch) -> torch.Tensor:
    """``BabyDoctor.forward`` with the logits of all tokens at once, as transformers computes its loss."""
    features = None if batch.pixel_values is None else self.encode_images(batch.pixel_values)
    embeds = self.embed_packed(batch.input_ids, batch.image_index, features)
    hidden = self.decode(embeds[None], batch.position_ids[None], batch.every)[0]
    logits = torch.nn.functional.linear(hidden, self.language_model.lm_head.weight).float()
    targets = torch.full_like(batch.input_ids, IGNORE_INDEX)
    targets[batch.tail_index[batch.loss_index]] = batch.loss_targets
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def pad_to_longest(
    examples: Sequence[Example], max_tokens: int, num_ranks: int = 1, *, share_prefix: bool = True
) -> list[Batch]:
    """``pack`` with every document padded to the longest one, as in a padded batch."""
    longest = max(map(len, examples))
    return pack([_padded(example, longest) for example in examples], max_tokens, num_ranks, share_prefix=share_prefix)


def _padded(example: Example, length: int) -> Example:
    fill = length - len(example)
    return replace(
        example,
        input_ids=np.append(example.input_ids, np.zeros(fill, np.int32)),
        labels=np.append(example.labels, np.full(fill, IGNORE_INDEX, np.int32)),
        image_mask=np.append(example.image_mask, np.zeros(fill, bool)),
    )


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module or a class within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _whole_last_layer() -> Iterator[None]:
    def whole(targets: np.ndarray, document_lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(document_lengths)

    with swapped(layout, "tail_lengths", whole):
        yield


def _use_torch_attention(model: BabyDoctor) -> None:
    model.vision.config._attn_implementation = "sdpa"


def _plain_optimizer(model: BabyDoctor, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.trainable_parameters().values(), lr=config.learning_rate, foreach=False)


PATHS = (
    FastPath(
        "attention per document",
        "one mask over the whole micro-batch",
        lambda: swapped(decoder_layer, "attend", square_attention),
    ),
    FastPath(
        "shared prefix computed once",
        "system prompt in every document",
        overrides=("train.share_prefix=false",),
    ),
    FastPath(
        "packing without padding",
        "each document padded to the longest",
        lambda: swapped(loader, "pack", pad_to_longest),
    ),
    FastPath(
        "cross-entropy in chunks at the loss positions",
        "float32 logits of all tokens",
        lambda: swapped(BabyDoctor, "forward", loss_of_all_logits),
    ),
    FastPath("last layer from the first loss position on", "the whole last layer", _whole_last_layer),
    FastPath("fused elementwise ops", "one op at a time", overrides=("train.fuse=false",)),
    FastPath("vision tower's attention as two matrix products", "torch's kernel", change=_use_torch_attention),
    FastPath(
        "fused optimizer",
        "one parameter at a time",
        lambda: swapped(bench_train, "build_optimizer", _plain_optimizer),
    ),
    FastPath("bfloat16", "float32", overrides=("model.dtype=float32",)),
    FastPath(
        "images read ahead by a worker process", "read by the training process", overrides=("data.num_workers=0",)
    ),
)


def bench_paths(
    stage: str,
    *,
    num_steps: int,
    preset: str = "mini",
    device: str = "cpu",
    batch_size: int = 8,
    on_memory_stable: Callable[[], None] | None = None,
) -> Iterator[PathResult]:
    """Measure the paths in order and yield each result.

    Steps with and without a path alternate. Only one copy of the ``7b`` preset fits on a GPU, so there all steps with
    the path run before all steps without it.
    """
    for path in PATHS:
        if preset == "7b":
            seconds, peaks = _steps_apart(stage, path, num_steps, preset, device, batch_size)
        else:
            jobs = {is_on: _make_job(stage, path, preset, device, batch_size, is_on=is_on) for is_on in (True, False)}
            jobs = {is_on: replace(job, on_memory_stable=on_memory_stable) for is_on, job in jobs.items()}
            seconds, peaks = _steps_in_turn(path, jobs, num_steps), {}
            for is_on, job in jobs.items():
                with _switched(path, is_on):
                    peaks[is_on] = measure_peak(job)
        gain = statistics.median(without / with_ for with_, without in zip(seconds[True], seconds[False], strict=True))
        rates = {is_on: batch_size / statistics.median(values) for is_on, values in seconds.items()}
        yield PathResult(path, rates[True], rates[False], gain - 1, peaks[True], peaks[False])


def _make_job(stage: str, path: FastPath, preset: str, device: str, batch_size: int, *, is_on: bool) -> BenchJob:
    job = prepare(
        stage,
        preset,
        device,
        hardware=this_device(device),
        batch_size=batch_size,
        num_workers=1,
        overrides=() if is_on else path.overrides,
    )
    if not is_on:
        path.change(job.model)
    return job


NUM_WARMUP = 2
"""Run warm-up steps with and without the path. They are not counted."""


def _steps_in_turn(path: FastPath, jobs: dict[bool, BenchJob], num_steps: int) -> dict[bool, list[float]]:
    """Seconds of each step, one with the path and one without it."""
    running = {is_on: run_steps(job, num_steps + NUM_WARMUP) for is_on, job in jobs.items()}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(num_steps + NUM_WARMUP):
        for is_on in (True, False) if step % 2 else (False, True):
            with _switched(path, is_on):
                seconds[is_on].append(next(running[is_on])[0])
    return {is_on: values[NUM_WARMUP:] for is_on, values in seconds.items()}


def _steps_apart(
    stage: str, path: FastPath, num_steps: int, preset: str, device: str, batch_size: int
) -> tuple[dict[bool, list[float]], dict[bool, int]]:
    """Seconds of each step and peak bytes, first with the path, then without it."""
    seconds, peaks = {}, {}
    for is_on in (True, False):
        with _switched(path, is_on):
            job = _make_job(stage, path, preset, device, batch_size, is_on=is_on)
            torch.cuda.reset_peak_memory_stats()
            steps = list(run_steps(job, num_steps + NUM_WARMUP))
            seconds[is_on] = [step[0] for step in steps][NUM_WARMUP:]
            peaks[is_on] = torch.cuda.max_memory_allocated()
            del job
        torch.cuda.empty_cache()
    return seconds, peaks


@contextmanager
def _switched(path: FastPath, is_on: bool) -> Iterator[None]:
    with nullcontext() if is_on else path.off():
        yield
