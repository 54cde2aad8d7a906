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

from babydoctor.config import RunConfig
from babydoctor.data.loader import Encoder, StepDataset, iterate_steps
from babydoctor.data.rows import fingerprint, load_dataset_rows
from babydoctor.data.tokens import load_tokenizer
from babydoctor.engine.allocator import MOST_KEPT_BYTES, keep_freed_memory, use_huge_pages
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.lora import add_lora
from babydoctor.model.run_dir import Manifest, Stage, build_model
from babydoctor.model.vision import load_vision_config, num_patches
from babydoctor.plan.hardware import this_device
from babydoctor.plan.lengths import measure_statistics
from babydoctor.plan.plan import build_plan, check_fits, recompute_every
from babydoctor.plan.report import format_short
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import Cursor, load_snapshot, save_snapshot
from babydoctor.train.fusing import set_fusing
from babydoctor.train.in_training_eval import HeldOut, TaskAtIntervals
from babydoctor.train.optimizer import build_optimizer, set_learning_rate
from babydoctor.train.report import Reporter
from babydoctor.train.schedule import is_due, learning_rate_factor
from babydoctor.train.stage import finish_run, is_finished, prepare_manifest, prepare_output
from babydoctor.train.step import accumulate_gradients, seed_step

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

STEPS_TO_FULL_SIZE = 2
"""After these steps the process holds what it will hold: weights, the optimiser's state and a step's activations."""


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


def check_same_data(saved: Cursor, now: Cursor, snapshot: Path) -> Cursor:
    """Refuse to go on with other rows than the run began with."""
    if saved.data_fingerprint != now.data_fingerprint:
        raise UserError(
            f"{snapshot} was trained on other rows than data.rows holds now (fingerprint "
            f"{saved.data_fingerprint[:12]}, now {now.data_fingerprint[:12]}); put the rows back or begin anew"
        )
    return saved
