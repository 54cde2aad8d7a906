"""``babydoctor bench ranks``: losses, memory and time of the same steps with every strategy on two CPU ranks.

The command starts this module once per strategy with ``accelerate launch`` and the shipped configuration. Two rows are
for comparison: ``alone`` is one process, and ``one by one`` sums each gradient with its own blocking all-reduce. The
share of communication is the additional time compared with the same two ranks without any communication.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available

from babydoctor.bench.train import prepare, stage_config
from babydoctor.data.loader import StepData
from babydoctor.markers import markdown_table
from babydoctor.plan.hardware import this_cpu
from babydoctor.schema import UserError
from babydoctor.train.loop import prepare as prepare_trainee
from babydoctor.train.loop import take_step
from babydoctor.train.sharding import Trainee
from babydoctor.train.strategy import start_accelerator

ROWS = {
    "alone": None,
    "silent": "cpu_two_ranks",
    "one by one": "cpu_two_ranks",
    "DDP": "cpu_two_ranks",
    "FSDP2": "fsdp",
    "ZeRO-2": "deepspeed_zero2",
    "ZeRO-3": "deepspeed_zero3",
}
"""Name of each row and its file in ``configs/accelerate/``. ``silent`` communicates nothing and is not shown."""

WARMUP = 2


@dataclass(frozen=True)
class RankFigures:
    """What rank 0 measured: losses by step, bytes of its weights and optimizer state, median seconds of a step."""

    losses: list[float]
    held_bytes: int
    seconds: float
    num_gradients: int


def bench_ranks(num_steps: int) -> str:
    """Run every strategy; returns a Markdown table.

    Raises:
        UserError: a run failed.
    """
    rows = {name: file for name, file in ROWS.items() if file is None or "deepspeed" not in file or _has_deepspeed()}
    figures = {name: _launch(name, file, num_steps) for name, file in rows.items()}
    alone, silent = figures["alone"], figures.pop("silent")
    lines = []
    for name, row in figures.items():
        difference = max(abs(ours - theirs) for ours, theirs in zip(row.losses, alone.losses, strict=True))
        share = "-" if name == "alone" else f"{max(0.0, 1 - silent.seconds / row.seconds):.0%}"
        held = f"{row.held_bytes / 2**20:.1f}"
        lines.append((name, f"{row.losses[-1]:.5f}", f"{difference:.1e}", held, f"{row.seconds:.2f}", share))
    head = ("on two ranks", "last loss", "largest difference", "weights and optimizer per rank, MiB", "s per step")
    note = f"`one by one` sums {figures['one by one'].num_gradients} gradients with a blocking all-reduce each."
    return "\n".join([*markdown_table((*head, "communication"), lines), "", note])


def _has_deepspeed() -> bool:
    return bool(is_deepspeed_available())


def _launch(name: str, file: str | None, num_steps: int) -> RankFigures:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        program = ["-m", "babydoctor.bench.ranks", name, str(num_steps), str(out)]
        command = [sys.executable, *program]
        if file is not None:
            options = [f"--config_file=configs/accelerate/{file}.yaml", "--num_processes=2", "--main_process_port=0"]
            command = [sys.executable, "-m", "accelerate.commands.launch", *options, *program]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0 or not out.is_file():
            raise UserError(f"bench ranks: {name} failed; run it in the repository's root\n{done.stderr[-2000:]}")
        return RankFigures(**json.loads(out.read_text()))


def measure_rank(name: str, num_steps: int) -> RankFigures | None:
    """Train ``num_steps`` steps in this rank; None in other ranks than 0."""
    overrides = ["model.dtype=float32", "lora.dropout=0", "train.fuse=false", "lora.r=32"]
    config = stage_config("instruct", "mini", batch_size=8, num_workers=0, overrides=overrides)
    accelerator = start_accelerator(config.train)
    job = prepare("instruct", "mini", "cpu", hardware=this_cpu(), batch_size=8, num_workers=0, overrides=overrides)
    job.dataset.rank, job.dataset.num_ranks = accelerator.process_index, accelerator.num_processes
    trainee = prepare_trainee(job.model, config.train, accelerator)
    losses, seconds = [], []
    for step in range(WARMUP + num_steps):
        data = job.dataset[step]
        begun = time.perf_counter()
        with _communication(name, trainee, data, accelerator):
            result = take_step(trainee, data, step, WARMUP + num_steps, config.train, accelerator)
        seconds.append(time.perf_counter() - begun)
        losses.append(result.loss.item())
    if not accelerator.is_main_process:
        return None
    held = sum(map(_local_bytes, [*trainee.model.parameters(), *trainee.optimizer_tensors()]))
    number = len(trainee.model.trainable_parameters())
    return RankFigures(losses, held, sorted(seconds[WARMUP:])[num_steps // 2], number)


@contextlib.contextmanager
def _communication(name: str, trainee: Trainee, data: StepData, accelerator: Any) -> Iterator[None]:
    """Keep the engine's communication, disable it, or replace it by one all-reduce per gradient."""
    if name not in ("silent", "one by one"):
        yield
        return
    clip = accelerator.clip_grad_norm_

    def sum_and_clip(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        for parameter in parameters if name == "one by one" else ():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes
        return clip(parameters, max_norm)

    accelerator.clip_grad_norm_ = sum_and_clip
    with accelerator.no_sync(trainee.engine):
        yield
    accelerator.clip_grad_norm_ = clip


def _local_bytes(tensor: Any) -> int:
    local = getattr(tensor, "ds_tensor", getattr(tensor, "_local_tensor", tensor))
    return local.numel() * local.element_size()


if __name__ == "__main__":
    found = measure_rank(sys.argv[1], int(sys.argv[2]))
    if found is not None:
        Path(sys.argv[3]).write_text(json.dumps(asdict(found)))
