"""The training program: one stage from a configuration to a finished run directory.

Read ``train`` from top to bottom. All stages run through it; they differ in their configuration only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from babydoctor.config import RunConfig, TrainConfig
from babydoctor.data.loader import Encoder, StepData, StepDataset, iterate_steps
from babydoctor.data.rows import fingerprint, load_dataset_rows
from babydoctor.data.tokens import load_tokenizer
from babydoctor.files import explain_full_disk
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.lora import add_lora
from babydoctor.model.packed.select_ops import select_ops
from babydoctor.model.run_dir import Manifest, build_model
from babydoctor.model.vision import load_vision_config, num_patches
from babydoctor.plan.hardware import this_device
from babydoctor.plan.lengths import measure_statistics
from babydoctor.plan.plan import build_plan, check_fits, recompute_every
from babydoctor.plan.report import format_short
from babydoctor.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from babydoctor.train.in_training_eval import InTrainingEval
from babydoctor.train.interrupt import StopSignals
from babydoctor.train.optimizer import build_optimizer, is_due, learning_rate_factor, set_learning_rate
from babydoctor.train.output import OutputDirectory, is_finished, num_steps
from babydoctor.train.report import Reporter, StepResult
from babydoctor.train.stage import finish_run, prepare_manifest
from babydoctor.train.step import accumulate_gradients, explain_out_of_memory, seed_step
from babydoctor.train.tracking import check_tracking

logger = logging.getLogger(__name__)

STEPS_TO_FULL_SIZE = 2
"""Memory use is stable after this many steps: weights, optimizer state and a step's activations are allocated."""


def train(config: RunConfig, *, resume: bool = False, on_memory_stable: Callable[[], None] | None = None) -> Path:
    """Train one stage and return its run directory.

    Args:
        on_memory_stable: called once on the CPU after ``STEPS_TO_FULL_SIZE`` steps.

    Raises:
        UserError: the configuration, the data or the state of the output directory does not allow it.
        TrainingStopped: a signal ended the run; the checkpoint of its last step is saved.
    """
    check_tracking(config.tracking)
    run = Path(config.output_dir)
    if resume and is_finished(config):
        logger.warning("%s is finished already", run)
        return run
    accelerator = Accelerator()
    is_main, device = accelerator.is_main_process, accelerator.device
    full_disk = explain_full_disk("the run", run, "free some space and run the command again with --resume")
    output = OutputDirectory(config, resume=resume, is_main=is_main)
    with StopSignals() as stop, full_disk, explain_out_of_memory(config.train), output:
        with accelerator.main_process_first():
            output.find_checkpoint()
            manifest, projector_file = prepare_manifest(config)

        # The data: rows are checked now; images are read ahead, step by step.
        tokenizer = load_tokenizer(manifest.language_model)
        samples = load_dataset_rows(config.data.rows, config.data.images, config.data.on_bad, run / "bad.jsonl")
        num_image_tokens = num_patches(load_vision_config(manifest.vision_tower))
        encoder = Encoder(config.data, tokenizer, manifest.image, num_image_tokens)

        # The plan: refuse what cannot fit before anything large is loaded, and choose the `auto` settings.
        plan = build_plan(config, this_device(str(device)), statistics=measure_statistics(samples, encoder.encode))
        check_fits(config, plan)
        tokens = plan.micro_batch_tokens
        ranks = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
        dataset = StepDataset(samples, config.data, config.train, encoder, max_tokens=tokens, **ranks)
        total_steps = num_steps(config, len(dataset))

        # Where to begin: at the first step, or after the newest checkpoint.
        state = TrainState(step=0, samples=0, data_fingerprint=fingerprint(samples))
        state = output.check_continues(state, manifest, len(dataset))
        evaluation = None
        if is_main:
            evaluation = InTrainingEval(config, manifest, encoder, max_tokens=tokens, total_steps=total_steps)

        # The model: frozen parts in model.dtype, the trainable ones in float32.
        model = build_trainable_model(config, manifest, projector_file, device)
        model.recompute_every = recompute_every(plan.gradient_checkpointing)
        optimizer = build_optimizer(model, config.train)
        if output.checkpoint is not None:
            load_checkpoint(output.checkpoint, model, optimizer)
        output.begin(manifest, state)
        first_step = state.step
        save = partial(save_checkpoint, run, model, optimizer, keep=config.train.keep_checkpoints)

        reporter = Reporter(run, config, first_step, total_steps, active=is_main)
        with reporter:
            stop.wait_for_steps()
            reporter.begin(model, len(samples), format_short(plan))
            # Make up for an evaluation during which the run was stopped; what is recorded is not done again.
            if evaluation and evaluation.is_due(first_step):
                stop.run_unless_stopped(partial(evaluation.report, model, state, reporter))
            for data in iterate_steps(dataset, first_step, total_steps, config.data.num_workers):
                started = time.monotonic()
                result = take_step(model, optimizer, data, state.step, total_steps, config.train, accelerator)
                state = TrainState(state.step + 1, state.samples + data.num_samples, state.data_fingerprint)
                output.keep()
                if on_memory_stable and device.type == "cpu" and state.step - first_step == STEPS_TO_FULL_SIZE:
                    on_memory_stable()
                reporter.step(state, data, started, result)

                # The checkpoint comes first: an evaluation that fails or is stopped loses no step.
                is_saved = is_due(config.train.save_every, state.step, total_steps)
                if is_main and is_saved:
                    save(state)
                if evaluation and evaluation.is_due(state.step):
                    stop.run_unless_stopped(partial(evaluation.report, model, state, reporter))
                if share_stop(stop, accelerator) and state.step < total_steps:
                    if is_main and not is_saved:
                        save(state)
                    raise stop.stopped_after(state.step, total_steps, run)

            if is_main:
                finish_run(run, manifest, model, state)
        reporter.conclude()
        accelerator.wait_for_everyone()
    return run


def build_trainable_model(
    config: RunConfig, manifest: Manifest, projector_file: Path | None, device: torch.device
) -> BabyDoctor:
    """The stage's model, with gradients for what the configuration trains and seeded random weights."""
    torch.manual_seed(config.train.seed)
    model = build_model(manifest, Path(config.output_dir), projector=projector_file, device=device)
    if "projector" in config.trainable:
        model.projector.float().requires_grad_(True)
    if config.lora is not None:
        add_lora(model.language_model, config.lora)
    model.ops = select_ops(config.train.fuse, model.device, model.language_model.config.hidden_size)
    return model.train()


def take_step(
    model: BabyDoctor,
    optimizer: torch.optim.Optimizer,
    data: StepData,
    step: int,
    total_steps: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> StepResult:
    """One optimizer step, counted from 0: gradients of all micro-batches, clipping, update."""
    factor = learning_rate_factor(step, total_steps, config.warmup_ratio, config.schedule)
    learning_rate = set_learning_rate(optimizer, factor)
    seed_step(config.seed, step, accelerator.process_index)
    loss = accumulate_gradients(model, data, accelerator)
    norm = torch.nn.utils.clip_grad_norm_(model.trainable_parameters().values(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm, learning_rate)


def share_stop(stop: StopSignals, accelerator: Accelerator) -> bool:
    """True on all ranks after the same step if any rank received a stop signal."""
    if accelerator.num_processes > 1:
        received = torch.tensor(stop.received or 0, device=accelerator.device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        stop.received = int(received.item()) or None
    return stop.received is not None
