"""Evaluation during training: held-out loss and sample answers, and an evaluation task every so many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from babydoctor.config import EvalTaskConfig, RunConfig
from babydoctor.conversation import get_template, render_prompt
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
from babydoctor.train.checkpoint import Cursor
from babydoctor.train.report import Reporter
from babydoctor.train.step import forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TASK_RESAMPLES = 200
"""Bootstrap resamples of a task evaluated during training: few, because the intervals are only glanced at."""


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
