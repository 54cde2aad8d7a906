"""The training program: one stage from a configuration to a finished run directory.

Read ``train`` from top to bottom. All stages run through it; they differ in their configuration only.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from babydoctor.config import EvalTaskConfig, RunConfig
from babydoctor.conversation import get_template, render_prompt
from babydoctor.data.loader import Encoder, StepData, StepDataset, iterate_steps
from babydoctor.data.packing import pack
from babydoctor.data.rows import fingerprint, load_dataset_rows, read_image
from babydoctor.data.tokens import load_tokenizer
from babydoctor.engine.allocator import MOST_KEPT_BYTES, keep_freed_memory, use_huge_pages
from babydoctor.eval.ask import GenerationConfig
from babydoctor.eval.conditions import check_conditions
from babydoctor.eval.run import EvalConfig, evaluate_task
from babydoctor.eval.tasks import TaskConfig, load_task
from babydoctor.imaging.load import to_pixels
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.generate import generate
from babydoctor.model.language_model import add_lora
from babydoctor.model.run_dir import Manifest, Stage, build_model
from babydoctor.model.vision import load_vision_config, num_patches
from babydoctor.plan.hardware import this_device
from babydoctor.plan.lengths import measure_statistics
from babydoctor.plan.plan import build_plan, check_fits, recompute_every
from babydoctor.plan.report import format_short
from babydoctor.schema import Batch, Sample, UserError
from babydoctor.train.checkpoint import Cursor, load_snapshot, save_snapshot
from babydoctor.train.fusing import set_fusing
from babydoctor.train.optimizer import build_optimizer, set_learning_rate
from babydoctor.train.report import Reporter
from babydoctor.train.schedule import is_due, learning_rate_factor
from babydoctor.train.stage import finish_run, is_finished, prepare_manifest, prepare_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STEPS_TO_FULL_SIZE = 2
"""After these steps the process holds what it will hold: weights, the optimiser's state and a step's activations."""

NUM_TASK_RESAMPLES = 200
"""Bootstrap resamples of a task at intervals: few, for what is looked at in passing."""


def train(config: RunConfig, *, resume: bool = False) -> Path:
    """Train one stage and return its run directory.

    Raises:
        UserError: the configuration, the data or the state of the output directory does not allow it.
    """
    run = Path(config.output_dir)
    if resume and is_finished(run):
        logger.warning("%s is finished already", run)
        return run
    accelerator = Accelerator()
    with accelerator.main_process_first():
        snapshot = prepare_output(config, resume=resume or not accelerator.is_main_process)
        manifest, projector_file = prepare_manifest(config)

    # The data: rows are checked now; images are read ahead, step by step.
    tokenizer = load_tokenizer(manifest.language_model)
    samples = load_dataset_rows(config.data.rows, config.data.images, config.data.on_bad, run / "bad.jsonl")
    num_image_tokens = num_patches(load_vision_config(manifest.vision_tower))
    encoder = Encoder(config.data, tokenizer, manifest.image, num_image_tokens)

    # The plan: what cannot fit is refused before anything large is loaded; `auto` settings are chosen.
    statistics = measure_statistics(samples, encoder.encode)
    plan = build_plan(config, this_device(str(accelerator.device)), statistics=statistics)
    check_fits(config, plan)
    dataset = StepDataset(
        samples,
        config,
        encoder,
        max_tokens=plan.micro_batch_tokens,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    total_steps = config.train.max_steps or len(dataset) * config.train.epochs

    # The model: frozen parts in model.dtype, the trainable ones in float32.
    model = build_trainable_model(config, manifest, projector_file, accelerator.device)
    model.recompute_every = recompute_every(plan.gradient_checkpointing)
    optimizer = build_optimizer(model, config.train)

    # Where to begin: at the start, or exactly where the newest checkpoint stands.
    cursor = Cursor(step=0, samples=0, data_fingerprint=fingerprint(samples))
    if snapshot is not None:
        cursor = check_same_data(load_snapshot(snapshot, model, optimizer), cursor, snapshot)
    steps = iterate_steps(dataset, cursor.step, total_steps, config.data.num_workers)
    first_step = cursor.step
    if accelerator.device.type == "cpu":
        keep_freed_memory(MOST_KEPT_BYTES)

    with Reporter(run, config, cursor.step, total_steps, active=accelerator.is_main_process) as reporter:
        held_out = HeldOut(config, encoder, plan.micro_batch_tokens) if reporter.active else None
        task = TaskAtIntervals(config.eval, manifest, tokenizer) if reporter.active and config.eval else None
        reporter.begin(model, len(samples), format_short(plan))
        for data in steps:
            begun = time.monotonic()
            factor = learning_rate_factor(cursor.step, total_steps, config.train.warmup_ratio, config.train.schedule)
            learning_rate = set_learning_rate(optimizer, factor)
            seed_step(config.train.seed, cursor.step, accelerator.process_index)
            loss = accumulate_gradients(model, data, accelerator)
            norm = torch.nn.utils.clip_grad_norm_(
                model.trainable_parameters().values(), config.train.max_grad_norm
            ).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            cursor = Cursor(cursor.step + 1, cursor.samples + data.num_samples, cursor.data_fingerprint)

            if accelerator.device.type == "cpu" and cursor.step - first_step == STEPS_TO_FULL_SIZE:
                use_huge_pages()
            reporter.step(cursor, data, begun, loss=loss, gradient_norm=norm, learning_rate=learning_rate)
            if held_out and is_due(config.train.eval_every, cursor.step, total_steps):
                held_out.report(model, tokenizer, cursor, reporter)
            if task and is_due(task.every_steps, cursor.step, total_steps):
                task.report(model, cursor, reporter)
            if reporter.active and is_due(config.train.save_every, cursor.step, total_steps):
                save_snapshot(run, model, optimizer, cursor, keep=config.train.keep_checkpoints)

        if reporter.active:
            stage = Stage(
                name=config.name,
                steps=cursor.step,
                samples=cursor.samples,
                data_fingerprint=cursor.data_fingerprint,
            )
            finish_run(run, manifest, model, stage)
    reporter.conclude()
    accelerator.wait_for_everyone()
    return run


def build_trainable_model(
    config: RunConfig, manifest: Manifest, projector_file: Path | None, device: torch.device
) -> BabyDoctor:
    """The stage's model with gradients where the configuration wants them, seeded."""
    torch.manual_seed(config.train.seed)
    model = build_model(manifest, Path(config.output_dir), projector=projector_file, device=device)
    if "projector" in config.trainable:
        model.projector.float().requires_grad_(True)
    if config.lora is not None:
        add_lora(model.language_model, config.lora)
    if config.train.compile:
        model.compile_layers()
    set_fusing(config.train, model)
    return model.train()


def accumulate_gradients(model: BabyDoctor, data: StepData, accelerator: Accelerator) -> float:
    """Forward and backward over this rank's micro-batches; gradients are summed over ranks.

    Returns:
        The mean loss per supervised token of the whole step, over all ranks. Each token weighs the same,
        however the step is split into micro-batches.
    """
    total = torch.zeros((), device=accelerator.device)
    for batch, pixels in zip(data.batches, data.pixels, strict=True):
        loss = forward(model, batch, pixels) / max(1, data.num_supervised)
        loss.backward()
        total += loss.detach()
    if accelerator.num_processes > 1:
        gradients = []
        for parameter in model.trainable_parameters().values():
            if parameter.grad is None:  # this rank had no sample with an image, or none at all
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
        torch.distributed.all_reduce(total)
    return total.item()


def forward(model: BabyDoctor, batch: Batch, pixels: torch.Tensor | None) -> torch.Tensor:
    """Summed loss of one micro-batch, computed in the frozen weights' precision."""
    device = model.device
    tensors = {
        name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True).long()
        for name in ("input_ids", "targets", "position_ids")
    }
    dtype = model.language_model.dtype
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(
            **tensors,
            image_mask=torch.from_numpy(batch.image_mask).to(device, non_blocking=True),
            document_lengths=batch.document_lengths,
            prefix_length=batch.prefix_length,
            pixel_values=None if pixels is None else pixels.to(device, non_blocking=True),
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators (LoRA's dropout) from the step, so that a resumed run draws the same numbers."""
    torch.manual_seed(hash((seed, step, rank)))


def check_same_data(saved: Cursor, now: Cursor, snapshot: Path) -> Cursor:
    """Refuse to go on with other rows than the run began with."""
    if saved.data_fingerprint != now.data_fingerprint:
        raise UserError(
            f"{snapshot} was trained on other rows than data.rows holds now (fingerprint "
            f"{saved.data_fingerprint[:12]}, now {now.data_fingerprint[:12]}); put the rows back or begin anew"
        )
    return saved


class HeldOut:
    """Held-out rows: their loss, and the model's answers to the first questions of a few."""

    def __init__(self, config: RunConfig, encoder: Encoder, max_tokens: int) -> None:
        data = config.data
        self.images_dir = data.eval_images or data.images
        samples = load_dataset_rows(data.eval_rows, self.images_dir, data.on_bad) if data.eval_rows else []
        self.encoder = encoder
        examples = [encoder.encode(sample) for sample in samples[: data.eval_limit]]
        self.batches = pack(examples, max_tokens, share_prefix=config.train.shares_prefix)
        self.shown = samples[: config.train.num_sample_answers]

    def report(self, model: BabyDoctor, tokenizer: PreTrainedTokenizerBase, cursor: Cursor, reporter: Reporter) -> None:
        """Report loss and answers, where there are held-out rows."""
        if self.shown or any(len(batch) for batch in self.batches):
            reporter.held_out(cursor, self.loss(model), self.answers(model, tokenizer))

    @torch.no_grad()
    def loss(self, model: BabyDoctor) -> float:
        """Mean loss per supervised token."""
        model.eval()
        total = sum(forward(model, batch, self.encoder.pixels(batch, self.images_dir)).item() for batch in self.batches)
        model.train()
        return total / sum(batch.num_supervised for batch in self.batches)

    def answers(self, model: BabyDoctor, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
        """Question, reference and the model's greedy answer for each shown sample."""
        return [self._answer(model, tokenizer, sample) for sample in self.shown]

    def _answer(self, model: BabyDoctor, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> dict[str, str]:
        pixels = None
        if sample.image is not None:
            picture = read_image(sample.image, self.images_dir)
            pixels = torch.from_numpy(to_pixels(picture, self.encoder.image))[None]
        prompt = render_prompt(sample.turns[:1], self.encoder.template)
        dtype = model.language_model.dtype
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            (answer,) = generate(model, tokenizer, [prompt], pixels, max_new_tokens=48)
        question, reference = sample.turns[0].text, sample.turns[1].text
        stop = get_template(self.encoder.template.name).stop
        return {"id": sample.id, "question": question, "reference": reference, "answer": answer.split(stop)[0]}


class TaskAtIntervals:
    """The task of the configuration's ``eval`` section. Its questions are read, and checked, before training begins."""

    def __init__(self, config: EvalTaskConfig, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
        self.every_steps = config.every_steps
        self.task = load_task(
            TaskConfig(config.task, config.data, config.images, config.split, max_questions=config.max_questions)
        )
        self.settings = EvalConfig(
            check_conditions(config.images_as), GenerationConfig(batch_size=config.batch_size), NUM_TASK_RESAMPLES
        )
        self.manifest, self.tokenizer = manifest, tokenizer

    def report(self, model: BabyDoctor, cursor: Cursor, reporter: Reporter) -> None:
        """Ask all questions and report the headline figures."""
        result = evaluate_task(model, self.tokenizer, self.manifest, self.task, self.settings)
        reporter.task(cursor, self.task.name, result)
