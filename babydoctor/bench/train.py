"""``babydoctor bench train``: run real training steps on random weights, synthetic images and real lengths.

Nothing is downloaded. Captions have the lengths of ROCO's captions in LLaMA-2's vocabulary; their words do not affect
speed. Everything else is the real training code: the data loader with decoding and resizing of images, packing,
forward, backward, clipping and the optimizer.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from babydoctor.bench.measure import matmul_flops_per_s, peak_allocated_bytes, synchronize, tensor_bytes
from babydoctor.bench.models import PRESETS, build_random_model
from babydoctor.config import RunConfig, apply_override, build_config
from babydoctor.data.loader import Encoder, StepData, StepDataset, iterate_steps
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.lora import add_lora
from babydoctor.model.nf4 import Quantization
from babydoctor.model.packed.select_ops import select_ops
from babydoctor.plan.hardware import Hardware, find_hardware, this_device
from babydoctor.plan.lengths import summarize_examples
from babydoctor.plan.model import describe_model
from babydoctor.plan.plan import Plan, build_plan, recompute_every
from babydoctor.schema import IGNORE_INDEX, Example, Sample, Turn, UserError
from babydoctor.train.optimizer import build_optimizer

STAGES = ("align", "instruct", "radiology")

CAPTION_LEVELS = (0, 5, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 95, 99, 100)
CAPTION_TOKENS = (2, 10, 13, 17, 19, 21, 26, 31, 36, 43, 47, 53, 70, 88, 134, 593)
"""Percentiles of the lengths of ROCO's 8,180 validation captions in tokens of LLaMA-2's vocabulary (mean 37.2)."""


@dataclass(frozen=True)
class StageResult:
    """The measurements of one stage. Times are in seconds, sizes in bytes."""

    stage: str
    samples_per_s: float
    tokens_per_s: float
    best_samples_per_s: float
    data_wait_share: float
    mfu: float
    """Model FLOPs per second as a share of the matrix product rate measured in the same run, without recomputation."""
    hardware_utilization: float
    """Like ``mfu``, including recomputation."""
    peak_bytes: int
    predicted_bytes: int
    plan: Plan


class SyntheticEncoder(Encoder):
    """Encodes samples with the lengths of ROCO's rows. Images are loaded from files as in training.

    The single user turn of a sample holds the number of tokens of its caption.
    """

    def __init__(self, vocabulary: int, image: ImageSettings, num_patches: int, num_before: int, num_after: int):
        self.vocabulary, self.image, self.num_patches = vocabulary, image, num_patches
        self.num_before, self.num_after = num_before, num_after

    def encode(self, sample: Sample) -> Example:
        num_caption = int(sample.turns[0].text)
        prompt = self.num_before + self.num_patches + self.num_after
        length = prompt + num_caption + 1
        ids = np.random.default_rng(num_caption).integers(3, self.vocabulary, length).astype(np.int32)
        ids[: self.num_before] = np.arange(3, 3 + self.num_before)  # the system prompt, shared by all samples
        image_mask = np.zeros(length, bool)
        image_mask[self.num_before : self.num_before + self.num_patches] = True
        ids[image_mask] = 0
        labels = np.where(np.arange(length) >= prompt, ids, IGNORE_INDEX).astype(np.int32)
        assert sample.image is not None
        return Example(sample.id, ids, labels, image_mask, (sample.image,))


def stage_config(
    stage: str, preset: str, *, batch_size: int, num_workers: int, overrides: Sequence[str] = ()
) -> RunConfig:
    """The stage's settings as in ``configs/``, on random weights."""
    is_7b = preset == "7b"
    values = {
        "name": stage,
        "output_dir": "unused",
        "model": {
            "language_model": "random",
            "vision_tower": "random",
            "quantization": "nf4" if stage == "radiology" else "none",
        },
        "lora": None if stage == "align" else {"r": 128, "alpha": 256, "dropout": 0.05},
        "data": {"rows": "unused", "image_mode": "pad", "max_length": 1024, "num_workers": num_workers},
        "train": {
            "batch_size": batch_size,
            "micro_batch_tokens": "auto" if is_7b else 8192,
            "gradient_checkpointing": "auto" if is_7b else "none",
            "learning_rate": 1e-4,
            "optimizer": "paged_adamw_8bit" if is_7b and stage != "align" else "adamw",
        },
    }
    for override in overrides:
        apply_override(values, override)
    return build_config(values)


def build_stage_model(config: RunConfig, preset: str, device: str) -> BabyDoctor:
    """The stage's model with random weights, ready to train."""
    double = config.model.double_quantization
    model = build_random_model(
        preset,
        device,
        dtype=getattr(torch, config.model.dtype),
        quantization=Quantization(double) if config.model.quantization == "nf4" else None,
    )
    model.projector.float().requires_grad_(True)
    if config.lora is not None:
        add_lora(model.language_model, config.lora)
        language_model: torch.nn.Module = model.language_model
        language_model.to(torch.device(device))
    model.ops = select_ops(config.train.fuse, model.device, model.language_model.config.hidden_size)
    return model.train()


def synthetic_samples(count: int) -> list[Sample]:
    """Rows with the lengths of ROCO's captions and gray JPEG images of a typical size."""
    from PIL import Image, ImageFilter

    generator = np.random.default_rng(0)
    lengths = np.interp(generator.uniform(0, 100, count), CAPTION_LEVELS, CAPTION_TOKENS).round().astype(int)
    images = []
    for _ in range(min(count, 16)):
        noise = Image.fromarray(generator.integers(0, 256, (512, 600), dtype=np.uint8))
        file = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(3)).save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    return [
        Sample(str(i), (Turn("user", str(length)), Turn("assistant", "caption")), images[i % len(images)])
        for i, length in enumerate(lengths)
    ]


@dataclass(frozen=True)
class BenchJob:
    """A stage that is ready to run. ``on_memory_stable`` is the hook of ``train.loop.train``."""

    config: RunConfig
    model: BabyDoctor
    dataset: StepDataset
    plan: Plan
    device: str
    on_memory_stable: Callable[[], None] | None = None


def prepare(
    stage: str,
    preset: str,
    device: str,
    *,
    hardware: Hardware,
    batch_size: int,
    num_workers: int,
    overrides: Sequence[str] = (),
    on_memory_stable: Callable[[], None] | None = None,
) -> BenchJob:
    """Build the model and the data of one stage. The plan decides settings that are ``auto``."""
    config = stage_config(stage, preset, batch_size=batch_size, num_workers=num_workers, overrides=overrides)
    model = build_stage_model(config, preset, device)
    # In `plain` only the image comes before a caption, in `llava_llama_2` also a system prompt and a question.
    before, after = (1, 0) if stage == "align" else (76, 5)
    image = ImageSettings(PRESETS[preset]["vision"]["image_size"], "pad", (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    encoder = SyntheticEncoder(model.language_model.config.vocab_size, image, model.num_patches, before, after)
    samples = synthetic_samples(512)
    lengths = replace(summarize_examples([encoder.encode(sample) for sample in samples]), num_samples=65_422)
    described = describe_model(config, configs=(model.language_model.config, model.vision.config))
    plan = build_plan(config, hardware, statistics=lengths, model=described)
    model.recompute_every = recompute_every(plan.gradient_checkpointing)
    dataset = StepDataset(samples, config.data, config.train, encoder, max_tokens=plan.micro_batch_tokens)
    return BenchJob(config, model, dataset, plan, device, on_memory_stable)


def run_steps(job: BenchJob, num_steps: int) -> Iterator[tuple[float, float, StepData]]:
    """Train. Yields for each step its seconds, the seconds spent waiting for data, and its batches."""
    from accelerate import Accelerator

    from babydoctor.train.loop import STEPS_TO_FULL_SIZE
    from babydoctor.train.step import accumulate_gradients, seed_step

    accelerator = Accelerator(cpu=job.device == "cpu")
    optimizer = build_optimizer(job.model, job.config.train)
    begun = time.perf_counter()
    for step, data in enumerate(iterate_steps(job.dataset, 0, num_steps, job.config.data.num_workers)):
        waited = time.perf_counter() - begun
        seed_step(0, step, 0)
        accumulate_gradients(job.model, data, accelerator)
        torch.nn.utils.clip_grad_norm_(job.model.trainable_parameters().values(), job.config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if job.on_memory_stable and job.device == "cpu" and step + 1 == STEPS_TO_FULL_SIZE:
            job.on_memory_stable()
        synchronize(job.device)
        yield time.perf_counter() - begun, waited, data
        begun = time.perf_counter()


def measure_peak(job: BenchJob) -> int:
    """Peak bytes of two training steps, including weights and optimizer state."""

    def two_steps() -> None:
        for _ in run_steps(replace(job, config=_without_workers(job.config)), 2):
            pass

    return tensor_bytes(job.model) + peak_allocated_bytes(two_steps, job.device)


def bench_stage(job: BenchJob, *, num_steps: int, ceiling: float, num_warmup: int = 2) -> StageResult:
    """Run one stage and compare it with its plan."""
    if job.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    steps = list(run_steps(job, num_steps + num_warmup))[num_warmup:]
    # On the CPU a profiler records allocations, so the peak is measured in separate steps.
    peak = torch.cuda.max_memory_allocated() if job.device.startswith("cuda") else measure_peak(job)
    seconds = [step[0] for step in steps]
    samples = sum(step[2].num_samples for step in steps)
    tokens = sum(step[2].num_tokens for step in steps)
    batch = job.config.train.batch_size
    typical = statistics.median(seconds)
    return StageResult(
        stage=job.config.name,
        samples_per_s=batch / typical,
        tokens_per_s=tokens / samples * batch / typical,
        best_samples_per_s=max(step[2].num_samples / step[0] for step in steps),
        data_wait_share=sum(step[1] for step in steps) / sum(seconds),
        mfu=job.plan.flops.model / typical / ceiling,
        hardware_utilization=job.plan.flops.total / typical / ceiling,
        peak_bytes=peak,
        predicted_bytes=job.plan.tensor_bytes,
        plan=job.plan,
    )


def bench_train(
    stages: tuple[str, ...],
    *,
    preset: str,
    device: str,
    num_steps: int,
    batch_size: int,
    num_workers: int,
    memory_cap: int | None = None,
    on_memory_stable: Callable[[], None] | None = None,
) -> Iterator[tuple[float, StageResult]]:
    """Measure the stages in order. Yields for each the matrix product rate measured just before, and the result.

    Raises:
        UserError: the preset does not run on the device, or an option is wrong.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset!r} is not one of {', '.join(PRESETS)}")
    if preset == "7b" and not device.startswith("cuda"):
        raise UserError("--preset 7b needs a CUDA device; on a CPU run --preset mini")
    hardware = this_device(device)
    if memory_cap is not None:
        if not device.startswith("cuda"):
            raise UserError("--memory-cap limits CUDA memory; there is none on a CPU")
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_cap / hardware.memory_bytes))
        hardware = replace(hardware, memory_bytes=memory_cap)
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"--stage {stage!r} is not one of {', '.join(STAGES)}")
        ceiling = matmul_flops_per_s(device, size=2048 if device == "cpu" else 8192)
        job = prepare(
            stage,
            preset,
            device,
            hardware=hardware,
            batch_size=batch_size,
            num_workers=num_workers,
            on_memory_stable=on_memory_stable,
        )
        yield ceiling, bench_stage(job, num_steps=num_steps, ceiling=ceiling)
        del job


def projected_hours(result: StageResult, gpu: str, utilization: float) -> float:
    """Hours for all of roco-instruct-65k on another device at a share of its peak."""
    operations = result.plan.flops.total * result.plan.num_steps
    return operations / (find_hardware(gpu).flops_per_s * utilization) / 3600


def _without_workers(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
