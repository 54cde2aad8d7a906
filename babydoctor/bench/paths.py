"""``babydoctor bench paths``: what each fast path of training brings, measured by switching it off.

Each entry of ``PATHS`` swaps one thing for its plain twin while a stage of the mini preset trains. A step with it and a
step without it take turns, so that a machine that grows slower meanwhile slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from babydoctor.bench.train import Job, measure_peak, prepare, run_steps
from babydoctor.config import TrainConfig
from babydoctor.data.packing import pack
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.packed.attention import Stretch, lay_out
from babydoctor.plan.hardware import this_device
from babydoctor.schema import IGNORE_INDEX, Batch, Example
from babydoctor.train.fusing import set_fusing


@dataclass(frozen=True)
class FastPath:
    """One fast path. ``overrides`` are settings that switch it off, ``off`` what else does."""

    name: str
    without: str
    off: Callable[[], AbstractContextManager[Any]] = nullcontext
    overrides: tuple[str, ...] = ()
    change: Callable[[BabyDoctor], None] = lambda model: None
    without_prefix: bool = False
    """Measured, on and off, without a shared prefix, which the plain twin does not know."""


@dataclass(frozen=True)
class PathResult:
    """Medians over steps; sizes in bytes."""

    path: FastPath
    samples_per_s: float
    samples_per_s_without: float
    gain: float
    """In speed, from pairs of steps: 0.5 is half as fast again."""
    peak_bytes: int
    peak_bytes_without: int


def square_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_lengths: Sequence[int],
    query_lengths: Sequence[int] | None = None,
    prefix_length: int = 0,
) -> torch.Tensor:
    """``attend`` by one mask of ``Q x T``: what packing costs where other documents are only masked out."""
    layout = lay_out(document_lengths, query_lengths, prefix_length)
    mask = dense_mask(layout, len(query), len(key)).to(query.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def dense_mask(layout: Sequence[Stretch], num_rows: int, num_keys: int) -> torch.Tensor:
    """Bool ``[Q, T]``: what each position that asks may see."""
    mask = torch.zeros(num_rows, num_keys, dtype=torch.bool)
    for stretch in layout:
        own = stretch.keys.stop - stretch.keys.start
        mask[stretch.rows, : stretch.shared] = True
        causal = torch.ones(stretch.num_rows, own, dtype=torch.bool).tril(own - stretch.num_rows)
        mask[stretch.rows, stretch.keys] = causal
    return mask


def loss_of_all_logits(
    self: BabyDoctor,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    position_ids: torch.Tensor,
    image_mask: torch.Tensor,
    document_lengths: tuple[int, ...],
    pixel_values: torch.Tensor | None = None,
    prefix_length: int = 0,
) -> torch.Tensor:
    """``BabyDoctor.forward`` with the logits of every position at once, as transformers computes its loss."""
    features = None if pixel_values is None else self.encode_images(pixel_values)
    embeds = self.embed(input_ids[None], image_mask[None], features)
    hidden = self.decode(embeds, position_ids[None], document_lengths, None, prefix_length)[0]
    logits = torch.nn.functional.linear(hidden, self.language_model.lm_head.weight).float()
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def pad_to_longest(
    examples: Sequence[Example], max_tokens: int, num_ranks: int = 1, *, share_prefix: bool = True
) -> list[Batch]:
    """``pack`` with every document filled up to the longest one's length, as a padded batch is computed."""
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
def _whole_last_layer() -> Iterator[None]:
    def whole(targets: torch.Tensor, document_lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(document_lengths)

    with patch("babydoctor.model.babydoctor.supervised_tails", whole):
        yield


def _use_transformers_layers(model: BabyDoctor) -> None:
    model.compiled = True  # without having compiled them


def _use_torch_attention(model: BabyDoctor) -> None:
    model.vision.config._attn_implementation = "sdpa"


def _plain_optimizer(model: BabyDoctor, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.trainable_parameters().values(), lr=config.learning_rate, foreach=False)


PATHS = (
    FastPath(
        "attention document by document",
        "one mask over the whole micro-batch",
        lambda: patch("babydoctor.model.packed.decoder_layer.attend", square_attention),
    ),
    FastPath(
        "common beginning computed once",
        "system prompt in every document",
        overrides=("train.share_prefix=false",),
    ),
    FastPath(
        "packing without padding",
        "each document padded to the longest",
        lambda: patch("babydoctor.data.loader.pack", pad_to_longest),
    ),
    FastPath(
        "own decoder layers",
        "transformers' layers and peft's LoRA",
        change=_use_transformers_layers,
        without_prefix=True,
    ),
    FastPath(
        "cross-entropy in chunks at the targets",
        "float32 logits of all positions",
        lambda: patch.object(BabyDoctor, "forward", loss_of_all_logits),
    ),
    FastPath("last layer from the first target on", "the whole last layer", _whole_last_layer),
    FastPath("elementwise chains as one kernel each", "one operation after the other", overrides=("train.fuse=false",)),
    FastPath("tower's attention as two products", "torch's kernel", change=_use_torch_attention),
    FastPath(
        "fused optimiser",
        "one parameter after the other",
        lambda: patch("babydoctor.bench.train.build_optimizer", _plain_optimizer),
    ),
    FastPath("bfloat16", "float32", overrides=("model.dtype=float32",)),
    FastPath("images read ahead by a process", "read by the training process", overrides=("data.num_workers=0",)),
)


def bench_paths(stage: str, *, num_steps: int, batch_size: int = 8) -> Iterator[PathResult]:
    """Measure one path after the other on the mini preset; yields each result as it comes."""
    for path in PATHS:
        jobs = {True: _make_job(stage, path, batch_size, is_on=True)}
        jobs[False] = _make_job(stage, path, batch_size, is_on=False)
        seconds = _steps_in_turn(path, jobs, num_steps)
        peaks = {}
        for is_on, job in jobs.items():
            with _switched(path, job, is_on):
                peaks[is_on] = measure_peak(job)
        gain = statistics.median(without / with_ for with_, without in zip(seconds[True], seconds[False], strict=True))
        rates = {is_on: batch_size / statistics.median(values) for is_on, values in seconds.items()}
        yield PathResult(path, rates[True], rates[False], gain - 1, peaks[True], peaks[False])


def _make_job(stage: str, path: FastPath, batch_size: int, *, is_on: bool) -> Job:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    overrides = ("train.share_prefix=false",) if path.without_prefix else ()
    job = prepare(
        stage,
        "mini",
        device,
        hardware=this_device(device),
        batch_size=batch_size,
        num_workers=1,
        overrides=overrides if is_on else (*overrides, *path.overrides),
    )
    if not is_on:
        path.change(job.model)
    return job


def _steps_in_turn(path: FastPath, jobs: dict[bool, Job], num_steps: int) -> dict[bool, list[float]]:
    """Seconds of each step, one with the path and one without it, after two of each that are not counted."""
    num_warmup = 2
    running = {is_on: run_steps(job, num_steps + num_warmup) for is_on, job in jobs.items()}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(num_steps + num_warmup):
        for is_on in (True, False) if step % 2 else (False, True):
            with _switched(path, jobs[is_on], is_on):
                seconds[is_on].append(next(running[is_on])[0])
    return {is_on: values[num_warmup:] for is_on, values in seconds.items()}


@contextmanager
def _switched(path: FastPath, job: Job, is_on: bool) -> Iterator[None]:
    set_fusing(job.config.train, job.model)  # of the process, not of the model
    with nullcontext() if is_on else path.off():
        yield
