"""Samples -> the micro-batches of each optimiser step, prepared ahead in worker processes.

What a step holds is a function of the configuration and the step number alone. So the step number is the data
cursor: a resumed run asks for step ``n`` and gets what an uninterrupted run got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from babydoctor.config import DataConfig, RunConfig
from babydoctor.conversation import get_template, render
from babydoctor.data.packing import pack
from babydoctor.data.rows import StepSampler, read_image
from babydoctor.data.tokens import encode
from babydoctor.imaging.preprocess import ImageSettings, to_pixels
from babydoctor.schema import Batch, Example, Sample, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StepData:
    """What one rank does in one optimiser step.

    ``num_supervised``, ``num_tokens`` and ``num_samples`` are those of the whole step, over all ranks; a prefix that
    samples share counts in each of them.
    ``pixels[i]`` is float32 ``[N, 3, S, S]`` for ``batches[i]``, or None without images.
    """

    batches: list[Batch]
    pixels: list[torch.Tensor | None]
    num_supervised: int
    num_tokens: int
    num_samples: int
    cut: list[tuple[str, int]] = field(default_factory=list)
    """(sample id, tokens cut) of samples over data.max_length."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(sample id, reason) of samples left out, with data.on_bad=quarantine."""


class Encoder:
    """Samples -> examples -> pixels, with the settings of one stage."""

    def __init__(
        self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, image: ImageSettings, num_patches: int
    ) -> None:
        self.tokenizer = tokenizer
        self.template = get_template(data.template)
        self.image = image
        self.num_patches = num_patches
        self.max_length = data.max_length

    def encode(self, sample: Sample) -> Example:
        """Render and tokenise one sample.

        Raises:
            UserError: the sample cannot be rendered, cut to length or supervised.
        """
        try:
            example = encode(
                render(sample.turns, self.template),
                self.tokenizer,
                self.num_patches,
                max_length=self.max_length,
                id=sample.id,
                images=() if sample.image is None else (sample.image,),
            )
        except UserError as error:
            raise UserError(f"{sample.source or sample.id}: {error}") from error
        if example.num_supervised == 0:
            raise UserError(f"{sample.source or sample.id}: no token is supervised; the answer is empty")
        return example

    def pixels(
        self, batch: Batch, images_dir: str | None, loaded: Mapping[str | bytes, np.ndarray] | None = None
    ) -> torch.Tensor | None:
        """The pixels of a batch's images, ``[N, 3, S, S]``; those in ``loaded`` are not read again."""
        if not batch.images:
            return None
        loaded = loaded or {}
        pixels = [loaded[image] if image in loaded else self.read(image, images_dir) for image in batch.images]
        return torch.from_numpy(np.stack(pixels))

    def read(self, image: str | bytes, images_dir: str | None) -> np.ndarray:
        """One image as pixels ``[3, S, S]``. Raises ``UserError`` where it cannot be read."""
        return to_pixels(read_image(image, images_dir), self.image)


class StepDataset(Dataset[StepData]):
    """Indexed by optimiser step."""

    def __init__(
        self,
        samples: Sequence[Sample],
        config: RunConfig,
        encoder: Encoder,
        *,
        max_tokens: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.samples = samples
        self.encoder = encoder
        self.images_dir = config.data.images
        self.quarantine = config.data.on_bad == "quarantine"
        self.max_tokens = max_tokens
        self.share_prefix = config.train.shares_prefix
        self.rank, self.num_ranks = rank, num_ranks
        self.sampler = StepSampler(len(samples), config.train.batch_size, config.train.seed)

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __getitem__(self, step: int) -> StepData:
        bad: list[tuple[str, str]] = []
        examples: list[Example] = []
        loaded: dict[str | bytes, np.ndarray] = {}
        for index in self.sampler.samples_of_step(step):
            sample = self.samples[index]
            try:
                example = self.encoder.encode(sample)
                if self.quarantine and sample.image is not None:
                    # Every rank must agree on what is left out, so each reads all images of the step.
                    loaded[sample.image] = self.encoder.read(sample.image, self.images_dir)
            except UserError as error:
                if not self.quarantine:
                    raise
                bad.append((sample.id, str(error)))
            else:
                examples.append(example)
        batches = pack(examples, self.max_tokens, self.num_ranks, share_prefix=self.share_prefix)
        mine = [batch for batch in batches[self.rank :: self.num_ranks] if len(batch)]
        return StepData(
            batches=mine,
            pixels=[self.encoder.pixels(batch, self.images_dir, loaded) for batch in mine],
            num_supervised=sum(batch.num_supervised for batch in batches),
            num_tokens=sum(len(example) for example in examples),
            num_samples=len(examples),
            cut=[(example.id, example.num_cut) for example in examples if example.num_cut],
            bad=bad,
        )


def iterate_steps(dataset: StepDataset, start: int, total: int, num_workers: int) -> Iterator[StepData]:
    """Yield the steps ``start .. total - 1`` in order, read ahead by ``num_workers`` processes."""
    loader: DataLoader[StepData] = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, total),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        generator=torch.Generator(),  # so that the loader draws nothing from the global generator
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader
