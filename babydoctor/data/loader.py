"""Samples -> the micro-batches of each optimizer step, prepared ahead in worker processes.

The content of a step depends only on the configuration and the step number. A resumed run asks for step ``n`` and gets
the same micro-batches as an uninterrupted run.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from babydoctor.config import DataConfig, TrainConfig
from babydoctor.conversation import get_template, render
from babydoctor.data.images import read_image
from babydoctor.data.layout import HostBatch
from babydoctor.data.packing import build_batch, pack
from babydoctor.data.tokens import encode
from babydoctor.imaging.preprocess import ImageSettings, to_pixels
from babydoctor.schema import IGNORE_INDEX, Batch, Example, Sample, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StepData:
    """The work of one rank in one optimizer step.

    ``num_supervised``, ``num_tokens`` and ``num_samples`` count the whole step, over all ranks. A shared prefix counts
    once per sample.
    """

    batches: list[HostBatch]
    num_supervised: int
    num_tokens: int
    num_samples: int
    cut: list[tuple[str, int]] = field(default_factory=list)
    """(sample id, tokens cut) of samples over data.max_length."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(sample id, reason) of samples left out, with data.on_bad=quarantine."""

    def pin_memory(self) -> StepData:
        """The hook that torch's data loader calls. Copies from pinned memory to the GPU do not block."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


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
        """Render and tokenize one sample.

        Raises:
            UserError: the sample cannot be rendered, cut to length or supervised.
        """
        try:
            example = encode(
                render(sample.turns, self.template, system=sample.system),
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
        """The pixels of a batch's images, ``[N, 3, S, S]``. Images in ``loaded`` are not read again."""
        if not batch.images:
            return None
        loaded = loaded or {}
        pixels = [loaded[image] if image in loaded else self.read(image, images_dir) for image in batch.images]
        return torch.from_numpy(np.stack(pixels))

    def read(self, image: str | bytes, images_dir: str | None) -> np.ndarray:
        """One image as pixels ``[3, S, S]``. Raises ``UserError`` if it cannot be read."""
        return to_pixels(read_image(image, images_dir), self.image)


class StepSampler:
    """The samples of each optimizer step, as a pure function of the step number.

    Each epoch goes through all samples once, in a new order made from ``(seed, epoch)``. The last step of an epoch
    takes the remaining samples, so none is lost or repeated.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        """``batch_size`` counts samples over all ranks and accumulated micro-batches."""
        assert num_samples > 0 and batch_size > 0, (num_samples, batch_size)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps_per_epoch = -(-num_samples // batch_size)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def samples_of_step(self, step: int) -> list[int]:
        """Indices of the samples of a step. Steps count from 0 across all epochs."""
        assert step >= 0, step
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size].tolist()


class StepDataset(Dataset[StepData]):
    """The steps of a run, indexed by optimizer step."""

    def __init__(
        self,
        samples: Sequence[Sample],
        data: DataConfig,
        train: TrainConfig,
        encoder: Encoder,
        *,
        max_tokens: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.samples = samples
        self.encoder = encoder
        self.images_dir = data.images
        self.quarantine = data.on_bad == "quarantine"
        self.max_tokens = max_tokens
        self.share_prefix = train.shares_prefix
        self.rank, self.num_ranks = rank, num_ranks
        self.sampler = StepSampler(len(samples), train.batch_size, train.seed)

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
                    # All ranks must leave out the same samples, so each rank reads all images of the step.
                    loaded[sample.image] = self.encoder.read(sample.image, self.images_dir)
            except UserError as error:
                if not self.quarantine:
                    raise
                bad.append((sample.id, str(error)))
            else:
                examples.append(example)
        batches = pack(examples, self.max_tokens, self.num_ranks, share_prefix=self.share_prefix)
        mine = self._batches_of_rank(batches) if examples else []
        return StepData(
            batches=[HostBatch(batch, self.encoder.pixels(batch, self.images_dir, loaded)) for batch in mine],
            num_supervised=sum(batch.num_supervised for batch in batches),
            num_tokens=sum(len(example) for example in examples),
            num_samples=len(examples),
            cut=[(example.id, example.num_cut) for example in examples if example.num_cut],
            bad=bad,
        )

    def _batches_of_rank(self, batches: list[Batch]) -> list[Batch]:
        """This rank's micro-batches. Every rank has the same number, because their backward passes synchronize.

        If a step has fewer documents than ranks, the remaining ranks get a dummy micro-batch without a loss.
        """
        mine = batches[self.rank :: self.num_ranks]
        if self.num_ranks == 1:
            return [batch for batch in mine if len(batch)]
        return [batch if len(batch) else _stand_in() for batch in mine]


def _stand_in() -> Batch:
    """A dummy micro-batch of two tokens without targets. Its loss and gradients are zero."""
    zeros = np.zeros(2, np.int32)
    labels = np.full(2, IGNORE_INDEX, np.int32)
    return build_batch([Example("", zeros, labels, np.zeros(2, np.bool_))])


def iterate_steps(dataset: StepDataset, start: int, total: int, num_workers: int) -> Iterator[StepData]:
    """Yield the steps ``start .. total - 1`` in order, read ahead by ``num_workers`` processes."""
    loader: DataLoader[StepData] = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, total),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),  # the loader must not draw from the global generator
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


def _ignore_stop_signals(worker: int) -> None:
    """Ignore signals that a terminal or Slurm sends to all processes of a job: the trainer handles them.

    The trainer needs its workers until it has saved a checkpoint. torch ends them when the trainer exits.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
