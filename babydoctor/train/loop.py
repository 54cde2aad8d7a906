"""The training program: one stage, from a configuration to a finished run directory.

Read ``train`` from top to bottom. All stages use it; they differ only in their configuration.
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
from babydoctor.conversation import get_template
from babydoctor.data.loader import Encoder, StepData, StepDataset, iterate_steps
from babydoctor.data.rows import fingerprint, load_dataset_rows
from babydoctor.data.template_tokens import check_template
from babydoctor.data.tokens import load_tokenizer
from babydoctor.files import explain_full_disk
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.families import load_vision_config
from babydoctor.model.lora import add_lora
from babydoctor.model.packed.select_ops import select_ops
from babydoctor.model.run_dir import Manifest, build_model
from babydoctor.model.vision import num_patches
from babydoctor.plan.hardware import this_device
from babydoctor.plan.lengths import measure_statistics
from babydoctor.plan.plan import check_fits, recompute_every
from babydoctor.plan.ranks import plan_ranks
from babydoctor.plan.report import format_short
from babydoctor.train.checkpoint import Checkpoint, TrainState, load_parameters, read_checkpoint, save_checkpoint
from babydoctor.train.identity import identify_start, shared_settings
from babydoctor.train.in_training_eval import EvalSchedule, InTrainingEval
from babydoctor.train.interrupt import StopSignals
from babydoctor.train.optimizer import build_optimizer, is_due, learning_rate_factor, set_learning_rate
from babydoctor.train.output import OutputDirectory, is_finished, num_steps
from babydoctor.train.ranks import Ranks
from babydoctor.train.report import Reporter, StepResult
from babydoctor.train.sharding import Trainee, whole
from babydoctor.train.stage import finish_run, prepare_manifest
from babydoctor.train.step import accumulate_gradients, explain_out_of_memory, seed_step
from babydoctor.train.strategy import start_accelerator, strategy_of
from babydoctor.train.tracking import check_tracking

logger = logging.getLogger(__name__)

STEPS_TO_FULL_SIZE = 2
"""Memory use is stable after this many steps: weights, optimizer state and the activations of a step are allocated."""


def train(config: RunConfig, *, resume: bool = False, on_memory_stable: Callable[[], None] | None = None) -> Path:
    """Train one stage and return its run directory.

    Args:
        resume: continue from the newest checkpoint in ``config.output_dir``.
        on_memory_stable: called once, after ``STEPS_TO_FULL_SIZE`` steps, and only on the CPU.

    Raises:
        UserError: the configuration or the data is invalid, or the output directory cannot take this run.
        TrainingStopped: a signal ended the run. If a step was done, its checkpoint is saved.
    """
    check_tracking(config.tracking)
    run = Path(config.output_dir)
    accelerator = start_accelerator(config.train)
    ranks, device = Ranks(accelerator), accelerator.device
    strategy, is_main = strategy_of(accelerator), ranks.is_main
    ranks.check_same({**shared_settings(config), "--resume": resume, "accelerate strategy": strategy})
    if ranks.from_main(lambda: resume and is_finished(config)):
        logger.warning("%s is already finished; to train longer, raise train.max_steps or train.epochs", run)
        return run
    full_disk = explain_full_disk("the run", run, "free some space and run the command again with --resume")
    output = OutputDirectory(config, ranks, resume=resume)
    with StopSignals() as stop, full_disk, explain_out_of_memory(config.train), output:
        output.find_checkpoint()
        manifest, projector_file = ranks.in_turn(lambda: prepare_manifest(config))

        # Data: check all rows now. Images are read later, a few steps ahead.
        tokenizer = load_tokenizer(manifest.language_model)
        check_template(get_template(config.data.template), tokenizer, manifest.language_model)
        bad_rows = run / "bad.jsonl" if is_main else None
        samples = load_dataset_rows(config.data.rows, config.data.images, config.data.on_bad, bad_rows)
        num_image_tokens = num_patches(load_vision_config(manifest.vision_tower))
        encoder = Encoder(config.data, tokenizer, manifest.image, num_image_tokens)

        # Plan: choose the `auto` settings, and refuse what cannot fit before anything large is loaded.
        lengths, hardware = measure_statistics(samples, encoder.encode), this_device(str(device))
        plan = plan_ranks(config, hardware, statistics=lengths, strategy=strategy, num_ranks=ranks.num_ranks).plan
        check_fits(config, plan)
        tokens = plan.micro_batch_tokens
        share = {"rank": ranks.rank, "num_ranks": ranks.num_ranks}
        dataset = StepDataset(samples, config.data, config.train, encoder, max_tokens=tokens, **share)
        total_steps = num_steps(config, len(dataset))

        # Start: the first step, or the step after the newest checkpoint.
        state = TrainState(step=0, samples=0, data_fingerprint=fingerprint(samples))
        found = {**identify_start(config, manifest), "data.rows": state.data_fingerprint, "micro-batch size": tokens}
        ranks.check_same(found)
        state = output.check_continues(state, manifest, len(dataset))
        schedule, evaluation = EvalSchedule(config, total_steps), None
        if is_main:
            evaluation = InTrainingEval(config, manifest, encoder, max_tokens=tokens, total_steps=total_steps)

        # Model: frozen parts in model.dtype, trainable parts in float32.
        model = build_trainable_model(config, manifest, projector_file, device)
        model.recompute_every = recompute_every(plan.gradient_checkpointing)
        trainee = prepare(model, config.train, accelerator, share_checkpoint(output.checkpoint, ranks))
        output.begin(manifest, state, strategy)
        first_step = state.step

        reporter = Reporter(run, config, first_step, total_steps, active=is_main)
        with reporter:
            stop.wait_for_steps()
            reporter.begin(plan.model.trainable, len(samples), format_short(plan))
            # Repeat an evaluation that a stop interrupted. Parts that are already recorded are skipped.
            if schedule.is_due(first_step):
                evaluate(evaluation, trainee, state, reporter, stop)
            ranks.wait()
            for data in iterate_steps(dataset, first_step, total_steps, config.data.num_workers):
                started = time.monotonic()
                result = take_step(trainee, data, state.step, total_steps, config.train, accelerator)
                state = TrainState(state.step + 1, state.samples + data.num_samples, state.data_fingerprint)
                output.keep()
                if on_memory_stable and device.type == "cpu" and state.step - first_step == STEPS_TO_FULL_SIZE:
                    on_memory_stable()
                reporter.step(state, data, started, result)

                # Save before evaluating, so that an evaluation that fails or is stopped loses no steps.
                is_saved = is_due(config.train.save_every, state.step, total_steps)
                if is_saved:
                    save(run, trainee, state, config.train)
                if schedule.is_due(state.step):
                    evaluate(evaluation, trainee, state, reporter, stop)
                # Other ranks wait here for rank 0. A signal that arrives during the call is seen after the next step.
                number = ranks.any_signal(stop.received)
                if number is not None and state.step < total_steps:
                    stop.received = number
                    if not is_saved:
                        save(run, trainee, state, config.train)
                    raise stop.stopped_after(state.step, total_steps, run)

            weights = trainee.gather_weights()
            if is_main:
                finish_run(run, manifest, model, state, weights)
        reporter.conclude()
        ranks.wait()
    return run


def build_trainable_model(
    config: RunConfig, manifest: Manifest, projector_file: Path | None, device: torch.device
) -> BabyDoctor:
    """Build the stage's model. New weights are drawn from ``train.seed``; only what is trained requires gradients."""
    torch.manual_seed(config.train.seed)
    model = build_model(manifest, Path(config.output_dir), projector=projector_file, device=device)
    if "projector" in config.trainable:
        model.projector.float().requires_grad_(True)
    if config.lora is not None:
        add_lora(model.language_model, config.lora)
    model.ops = select_ops(config.train.fuse, model.device, model.language_model.config.hidden_size)
    return model.train()


def share_checkpoint(path: Path | None, ranks: Ranks) -> Checkpoint | None:
    """Send the main process's checkpoint to all ranks, which need not have the file. None if ``path`` is None."""
    if path is None:
        return None
    here = read_checkpoint(path) if ranks.is_main else Checkpoint({}, {}, {})
    numbers = ranks.from_main(lambda: here.optimizer_numbers)
    return Checkpoint(ranks.share(here.parameters), ranks.share(here.optimizer_tensors), numbers)


def prepare(
    model: BabyDoctor, config: TrainConfig, accelerator: Accelerator, checkpoint: Checkpoint | None = None
) -> Trainee:
    """Build the optimizer, load the checkpoint, and let accelerate distribute both over the ranks."""
    if checkpoint is not None:
        load_parameters(checkpoint, model)
    trainee = Trainee(accelerator, model, build_optimizer(model, config))
    if checkpoint is not None:
        trainee.load_optimizer_state(checkpoint.optimizer_state())
    return trainee


def evaluate(
    evaluation: InTrainingEval | None, trainee: Trainee, state: TrainState, reporter: Reporter, stop: StopSignals
) -> None:
    """Evaluate in the main process. All ranks must call it; ``evaluation`` is None in the others."""
    with trainee.whole_weights():
        if evaluation is not None:
            stop.run_unless_stopped(partial(evaluation.report, trainee.model, state, reporter))


def save(run: Path, trainee: Trainee, state: TrainState, config: TrainConfig) -> None:
    """Write a checkpoint. All ranks must call it; the main process writes."""
    parameters, optimizer_state = trainee.gather_trained(), trainee.gather_optimizer_state()
    if trainee.is_main:
        save_checkpoint(run, parameters, optimizer_state, state, keep=config.keep_checkpoints)


def take_step(
    trainee: Trainee, data: StepData, step: int, total_steps: int, config: TrainConfig, accelerator: Accelerator
) -> StepResult:
    """Take optimizer step ``step``, counted from 0: gradients of all micro-batches, clipping, update."""
    factor = learning_rate_factor(step, total_steps, config.warmup_ratio, config.schedule)
    learning_rate = set_learning_rate(trainee.optimizer, factor)
    seed_step(config.seed, step, accelerator.process_index)
    loss = accumulate_gradients(trainee.engine, data, accelerator)
    norm = accelerator.clip_grad_norm_(list(trainee.model.trainable_parameters().values()), config.max_grad_norm)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, whole(torch.as_tensor(norm)), learning_rate)
