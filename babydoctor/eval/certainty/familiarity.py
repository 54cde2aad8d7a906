"""``babydoctor eval RUN --familiarity``: measure whether a run notices images unlike its training images.

The training images become reference points (``model/familiarity.py``). One half of the task's images sets the
threshold, at 5% false alarms; the other half measures the false alarms. Upside-down images, noise, pages of text and,
with ``--unfamiliar FOLDER``, photographs measure how often the run notices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.config import TaskConfig
from babydoctor.data.images import ImageFolder, read_image
from babydoctor.data.rows import load_dataset_rows
from babydoctor.eval.certainty.unfamiliar import (
    draw_many,
    noise_picture,
    photograph_pictures,
    text_picture,
    upside_down_pictures,
)
from babydoctor.eval.leakage import read_train_sources
from babydoctor.eval.load import load_task
from babydoctor.eval.metrics import auroc
from babydoctor.eval.tasks import Task
from babydoctor.files import write_json
from babydoctor.imaging.isolation import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.model.familiarity import NEIGHBORS, Familiarity, describe_images
from babydoctor.model.run_dir import Run, load_run, read_manifest, write_manifest
from babydoctor.schema import UserError

FALSE_ALARMS = 0.05

MAX_REFERENCES = 4096
"""Most training images that are kept: 16 MB for CLIP ViT-L/14."""

MAX_HELD_OUT = 1000
FEWEST_HELD_OUT = 40
"""Fewest held-out images. Half of them set the threshold, and fewer than 20 have no 95% quantile."""

NUM_DRAWN = 200
"""Number of images of noise, and of text."""

BATCH_SIZE = 64

OnImage = Callable[[str, int, int], None]
"""Called with the kind of images, the number done and the total."""


def evaluate_familiarity(
    run_directory: Path,
    task_config: TaskConfig,
    out: Path,
    *,
    unfamiliar: Path | None = None,
    max_references: int = MAX_REFERENCES,
    seed: int = 0,
    device: str = "cpu",
    progress: OnImage | None = None,
) -> dict[str, Any]:
    """Measure a run, write its reference points, its threshold and ``familiarity.json``, and record the figures.

    Args:
        task_config: its images are held out from training; ``train`` names the training rows, by default those in the
            run's ``config.yaml``.
        unfamiliar: folder of photographs.
        max_references: training images to keep.

    Raises:
        UserError: the training images are not on this machine, or the task has too few images.
    """
    progress = progress or (lambda kind, done, total: None)
    task = load_task(task_config)
    run = load_run(run_directory, device=device)
    held_out = _held_out_pictures(task, seed)
    references, count = _train_pictures(run_directory, task_config.train, max_references, seed)
    features = _describe(run, references, count, "training images", progress)
    if len(features) <= NEIGHBORS:
        raise UserError(f"the training rows have {len(features)} images; --familiarity needs more than {NEIGHBORS}")
    points = Familiarity.fit(features)

    def distances(kind: str, pictures: Iterable[Image.Image], total: int) -> np.ndarray:
        return points.distances(_describe(run, pictures, total, kind, progress))

    half = len(held_out) // 2
    threshold = alarm_threshold(distances("held-out images", held_out[:half], half))
    familiar = distances("held-out images", held_out[half:], len(held_out) - half)
    groups = {
        kind: distances(kind.replace("_", " "), pictures, total)
        for kind, (pictures, total) in _unfamiliar_groups(held_out[half:], unfamiliar, seed).items()
    }
    summary: dict[str, Any] = {
        "method": f"distance to nearest training image number {NEIGHBORS}, vision tower features",
        "task": task.name,
        "threshold": threshold,
        "num_references": len(features),
        "num_held_out": len(familiar),
        "false_alarms": float(np.mean(familiar > threshold)),
        "auroc": auroc(familiar, np.concatenate([*groups.values()])),
        "unfamiliar": {
            kind: {
                "num_images": len(values),
                "noticed": float(np.mean(values > threshold)),
                "auroc": auroc(familiar, values),
            }
            for kind, values in groups.items()
        },
    }
    replace(points, threshold=threshold).save(run_directory)
    write_manifest(run_directory, read_manifest(run_directory).model_copy(update={"familiarity": summary}))
    out.mkdir(parents=True, exist_ok=True)
    shown = {kind: values.tolist() for kind, values in {"held_out": familiar, **groups}.items()}
    write_json(out / "familiarity.json", {**summary, "distances": shown})
    return summary


def alarm_threshold(distances: np.ndarray, false_alarms: float = FALSE_ALARMS) -> float:
    """The distance that a new familiar image exceeds with probability ``false_alarms`` at most.

    Args:
        distances: ``[N]`` of familiar images. The threshold is the smallest of them for which this holds (split
            conformal prediction, Vovk et al. 2005), and the largest one if there are too few.
    """
    rank = min(len(distances), math.ceil((len(distances) + 1) * (1 - false_alarms)))
    return float(np.sort(distances)[rank - 1])


def _describe(run: Run, pictures: Iterable[Image.Image], total: int, kind: str, progress: OnImage) -> np.ndarray:
    """Features of all pictures, float32 ``[N, 2 D]``."""
    remaining, found, num_done = iter(pictures), [], 0
    while batch := [to_pixels(picture, run.manifest.image) for picture in islice(remaining, BATCH_SIZE)]:
        found.append(describe_images(run.model, np.stack(batch)))
        num_done += len(batch)
        progress(kind, num_done, total)
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def _held_out_pictures(task: Task, seed: int) -> list[Image.Image]:
    sources = {question.image_key: question.image for question in task.questions if question.image is not None}
    if len(sources) < FEWEST_HELD_OUT:
        raise UserError(
            f"the task has {len(sources)} images; --familiarity needs at least {FEWEST_HELD_OUT} that the run was not "
            "trained on"
        )
    keys = sorted(sources)
    order = np.random.default_rng(seed).permutation(len(keys))[:MAX_HELD_OUT]
    return [load_image(source) for index in order if (source := sources[keys[index]]) is not None]


def _train_pictures(
    run_directory: Path, train: Sequence[str], max_references: int, seed: int
) -> tuple[Iterator[Image.Image], int]:
    """Different training images, chosen at random, and their number."""
    rows, images = read_train_sources(run_directory)
    rows = list(train) or rows
    if not rows:
        raise UserError(
            f"the training rows in {run_directory / 'config.yaml'} are not on this machine; name them with --train"
        )
    folder = images or Path(rows[0]).parent / "images"
    samples = load_dataset_rows(rows, folder, "quarantine")
    references = list({sample.image: None for sample in samples if sample.image is not None})
    order = np.random.default_rng(seed).permutation(len(references))[:max_references]
    opened = ImageFolder(folder)
    return (read_image(references[index], opened) for index in order), len(order)


def _unfamiliar_groups(
    held_out: Sequence[Image.Image], folder: Path | None, seed: int
) -> dict[str, tuple[Iterator[Image.Image], int]]:
    """Kind -> its pictures and their number."""
    groups = {
        "upside_down": (upside_down_pictures(held_out, np.random.default_rng(seed)), len(held_out)),
        "noise": (draw_many(noise_picture, NUM_DRAWN, seed), NUM_DRAWN),
        "text": (draw_many(text_picture, NUM_DRAWN, seed), NUM_DRAWN),
    }
    if folder is not None:
        photographs = list(photograph_pictures(folder, np.random.default_rng(seed)))
        groups["photographs"] = (iter(photographs), len(photographs))
    return groups
