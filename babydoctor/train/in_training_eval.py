"""Evaluation during training: held-out loss with sample answers, and one evaluation task, each at its own interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from babydoctor.config import EvalTaskConfig, RunConfig
from babydoctor.conversation import get_template, render_prompt
from babydoctor.data.layout import HostBatch
from babydoctor.data.loader import Encoder
from babydoctor.data.packing import pack
from babydoctor.data.rows import load_dataset_rows, read_image
from babydoctor.eval.ask import GenerationConfig
from babydoctor.eval.conditions import check_conditions
from babydoctor.eval.run import EvalConfig, evaluate_task
from babydoctor.eval.tasks import TaskConfig, load_task
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.generate import generate
from babydoctor.model.run_dir import Manifest
from babydoctor.schema import Sample
from babydoctor.train.checkpoint import TrainState
from babydoctor.train.optimizer import is_due
from babydoctor.train.report import Reporter
from babydoctor.train.step import forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TASK_RESAMPLES = 200
"""Bootstrap resamples of a task during training. Few are enough for a glance at the intervals."""


class InTrainingEval:
    """Held-out rows and the task of the ``eval`` section. Rows and questions are read and checked on construction."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        encoder: Encoder,
        *,
        max_tokens: int,
        total_steps: int,
    ) -> None:
        self.total_steps = total_steps
        self.every = config.train.eval_every
        self.held_out = HeldOut(config, encoder, max_tokens) if config.data.eval_rows else None
        self.task = TaskAtIntervals(config.eval, manifest, encoder.tokenizer) if config.eval else None

    def is_due(self, step: int) -> bool:
        """True if there is something to evaluate after ``step`` steps."""
        return step > 0 and (self._held_out_is_due(step) or self._task_is_due(step))

    def report(self, model: BabyDoctor, state: TrainState, reporter: Reporter) -> None:
        """Evaluate what is due and not yet recorded for this step, and report it."""
        if self.held_out and self._held_out_is_due(state.step) and not reporter.has("eval", state.step):
            reporter.held_out(state, self.held_out.loss(model), self.held_out.answers(model))
        if self.task and self._task_is_due(state.step) and not reporter.has("task/right", state.step):
            reporter.task(state, self.task.task.name, self.task.evaluate(model))

    def _held_out_is_due(self, step: int) -> bool:
        return self.held_out is not None and is_due(self.every, step, self.total_steps)

    def _task_is_due(self, step: int) -> bool:
        return self.task is not None and is_due(self.task.every_steps, step, self.total_steps)


class HeldOut:
    """Held-out rows: their loss, and the model's answers to the first questions of some of them."""

    def __init__(self, config: RunConfig, encoder: Encoder, max_tokens: int) -> None:
        data = config.data
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
            total += forward(model, HostBatch(batch, self.encoder.pixels(batch, self.images_dir))).item()
        model.train()
        return total / sum(batch.num_supervised for batch in self.batches)

    def answers(self, model: BabyDoctor) -> list[dict[str, str]]:
        """Question, reference and the model's greedy answer for each shown sample."""
        return [self._answer(model, sample) for sample in self.shown]

    def _answer(self, model: BabyDoctor, sample: Sample) -> dict[str, str]:
        pixels = None
        if sample.image is not None:
            picture = read_image(sample.image, self.images_dir)
            pixels = torch.from_numpy(to_pixels(picture, self.encoder.image))[None]
        prompt = render_prompt(sample.turns[:1], self.encoder.template, system=sample.system)
        dtype = model.language_model.dtype
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            (answer,) = generate(model, self.encoder.tokenizer, [prompt], pixels, max_new_tokens=48)
        question, reference = sample.turns[0].text, sample.turns[1].text
        stop = get_template(self.encoder.template.name).stop
        return {"id": sample.id, "question": question, "reference": reference, "answer": answer.split(stop)[0]}


class TaskAtIntervals:
    """The task of the configuration's ``eval`` section."""

    def __init__(self, config: EvalTaskConfig, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
        self.every_steps = config.every_steps
        self.task = load_task(
            TaskConfig(config.task, config.data, config.images, config.split, max_questions=config.max_questions)
        )
        self.settings = EvalConfig(
            check_conditions(config.images_as), GenerationConfig(batch_size=config.batch_size), NUM_TASK_RESAMPLES
        )
        self.manifest, self.tokenizer = manifest, tokenizer

    def evaluate(self, model: BabyDoctor) -> dict[str, Any]:
        """Ask all questions and score the answers."""
        return evaluate_task(model, self.tokenizer, self.manifest, self.task, self.settings)
