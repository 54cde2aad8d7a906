"""Evaluate during training: held-out loss with sample answers, and one evaluation task, each at its own interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from babydoctor.config import InTrainingTaskConfig, RunConfig
from babydoctor.data.images import read_image
from babydoctor.data.layout import HostBatch
from babydoctor.data.loader import Encoder
from babydoctor.data.packing import pack
from babydoctor.data.rows import load_dataset_rows
from babydoctor.eval.ask import GenerationConfig
from babydoctor.eval.conditions import check_conditions
from babydoctor.eval.load import load_task
from babydoctor.eval.run import EvalConfig, evaluate_task
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.inference import Inference, Query
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.run_dir import Manifest
from babydoctor.schema import Sample
from babydoctor.train.checkpoint import TrainState
from babydoctor.train.optimizer import is_due
from babydoctor.train.report import Reporter
from babydoctor.train.step import forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TASK_RESAMPLES = 200
"""Bootstrap resamples for a task during training. A rough confidence interval needs few."""

MAX_ANSWER_TOKENS = 48
"""Longest sample answer, in tokens."""


class EvalSchedule:
    """The steps after which a run is evaluated. All ranks need it, because they wait while rank 0 evaluates."""

    def __init__(self, config: RunConfig, total_steps: int) -> None:
        self.total_steps = total_steps
        self.every = config.train.eval_every if config.data.eval_rows else None
        self.task_every = config.eval.every_steps if config.eval else None

    def is_due(self, step: int) -> bool:
        """True if an evaluation is due after ``step`` steps."""
        return step > 0 and (self.held_out_is_due(step) or self.task_is_due(step))

    def held_out_is_due(self, step: int) -> bool:
        return self.every is not None and is_due(self.every, step, self.total_steps)

    def task_is_due(self, step: int) -> bool:
        return self.task_every is not None and is_due(self.task_every, step, self.total_steps)


class InTrainingEval:
    """Evaluates held-out rows and the task of the ``eval`` section. The constructor reads and checks both."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        encoder: Encoder,
        *,
        max_tokens: int,
        total_steps: int,
    ) -> None:
        self.schedule = EvalSchedule(config, total_steps)
        self.held_out = HeldOut(config, manifest, encoder, max_tokens) if config.data.eval_rows else None
        self.task = TaskAtIntervals(config.eval, manifest, encoder.tokenizer) if config.eval else None

    def report(self, model: BabyDoctor, state: TrainState, reporter: Reporter) -> None:
        """Run and report the evaluations that are due and not recorded yet for this step."""
        if self.held_out and self.schedule.held_out_is_due(state.step) and not reporter.has("eval", state.step):
            reporter.held_out(state, self.held_out.loss(model), self.held_out.answers(model))
        if self.task and self.schedule.task_is_due(state.step) and not reporter.has("task/right", state.step):
            reporter.task(state, self.task.task.name, self.task.evaluate(model))


class HeldOut:
    """Held-out rows: computes their loss, and answers the first question of a few of them."""

    def __init__(self, config: RunConfig, manifest: Manifest, encoder: Encoder, max_tokens: int) -> None:
        data = config.data
        self.manifest = manifest
        self.images_dir = data.eval_images or data.images
        samples = load_dataset_rows(data.eval_rows, self.images_dir, data.on_bad)
        self.encoder = encoder
        examples = [encoder.encode(sample) for sample in samples[: data.eval_limit]]
        self.batches = pack(examples, max_tokens, share_prefix=config.train.shares_prefix)
        self.shown = samples[: config.train.num_sample_answers]

    @torch.no_grad()
    def loss(self, model: BabyDoctor) -> float:
        """Mean loss per supervised token."""
        model.eval()
        total = 0.0
        for batch in self.batches:
            host = HostBatch(batch, self.encoder.pixels(batch, self.images_dir))
            total += forward(model, host, model.device).item()
        model.train()
        return total / sum(batch.num_supervised for batch in self.batches)

    def answers(self, model: BabyDoctor) -> list[dict[str, str]]:
        """Question, reference and greedy answer for each sample in ``shown``."""
        if not self.shown:
            return []
        queries = [self._query(sample) for sample in self.shown]
        parts = (model, self.encoder.tokenizer, self.manifest)
        engine = {"pack_weights": False}  # no second copy of the weights during training
        with Inference.for_queries(*parts, queries, batch_size=len(queries), engine=engine) as inference:
            answers = list(inference.answers(queries))
        return [
            {
                "id": sample.id,
                "question": sample.turns[0].text,
                "reference": sample.turns[1].text,
                "answer": f"({answer.finish_reason})" if answer.finish_reason.startswith("error") else answer.text,
            }
            for sample, answer in zip(self.shown, answers, strict=True)
        ]

    def _query(self, sample: Sample) -> Query:
        pixels = None
        if sample.image is not None:
            pixels = to_pixels(read_image(sample.image, self.images_dir), self.encoder.image)
        return Query(sample.turns[:1], pixels, system=sample.system, max_new_tokens=MAX_ANSWER_TOKENS, id=sample.id)


class TaskAtIntervals:
    """The task of the configuration's ``eval`` section."""

    def __init__(self, config: InTrainingTaskConfig, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task = load_task(config)
        self.settings = EvalConfig(
            check_conditions(config.images_as), GenerationConfig(batch_size=config.batch_size), NUM_TASK_RESAMPLES
        )
        self.manifest, self.tokenizer = manifest, tokenizer

    def evaluate(self, model: BabyDoctor) -> dict[str, Any]:
        """Ask all questions and score the answers."""
        return evaluate_task(model, self.tokenizer, self.manifest, self.task, self.settings)
