"""Familiarity: how far an image is from the images that a run was trained on, in features of its vision tower.

An image is described by the mean and the standard deviation of its patch features. Its distance is the Euclidean
distance to its ``NEIGHBORS``-th nearest training image, after every feature was scaled to unit variance over the
training images. A distance beyond the threshold of the run means: unlike anything it was trained on.

Source: Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbors". Measured on the tiny preset
against Mahalanobis distances and other descriptions, see ``babydoctor/eval/README.md``.

Shapes: ``N`` images, ``R`` reference images, ``P`` patches, ``D`` hidden size of the tower, ``F = 2 D`` features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.tensor_files import load_tensors, save_tensors
from babydoctor.model.vision import patch_features
from babydoctor.schema import UserError

FILE_NAME = "familiarity.safetensors"

NEIGHBORS = 5

SMALLEST_SCALE = 1e-6
"""Smallest scale, so that a feature that is constant over the training images does not divide by zero."""

_NAMES = {"mean", "scale", "references", "threshold"}


@dataclass(frozen=True, eq=False)
class Familiarity:
    """Training images of a run as points in feature space.

    Attributes:
        mean: float32 ``[F]``.
        scale: float32 ``[F]``, the standard deviation over the training images.
        references: float16 ``[R, F]``, scaled.
        threshold: the largest distance of an image that counts as familiar.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    references: torch.Tensor
    threshold: float = float("inf")

    @classmethod
    def fit(cls, features: np.ndarray) -> Familiarity:
        """Points of the training images, without a threshold.

        Args:
            features: float32 ``[R, F]`` from ``describe_images``.
        """
        assert len(features) > NEIGHBORS, features.shape
        points = torch.from_numpy(features).float()
        mean, scale = points.mean(0), points.std(0).clamp_min(SMALLEST_SCALE)
        return cls(mean, scale, ((points - mean) / scale).half())

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Distance of each image to its ``NEIGHBORS``-th nearest training image.

        Args:
            features: float32 ``[N, F]``.

        Returns:
            float32 ``[N]``.
        """
        points = (torch.from_numpy(features).float() - self.mean) / self.scale
        all_distances = torch.cdist(points, self.references.float())  # [N, R]
        return all_distances.topk(NEIGHBORS, largest=False).values[:, -1].numpy()

    def save(self, run: Path) -> None:
        """Write the file of a run directory."""
        tensors = {"mean": self.mean, "scale": self.scale, "references": self.references}
        save_tensors({**tensors, "threshold": torch.tensor([self.threshold])}, run / FILE_NAME)

    @classmethod
    def load(cls, run: Path) -> Familiarity | None:
        """Read the file of a run directory; None if the run has none.

        Raises:
            UserError: the file is damaged.
        """
        path = run / FILE_NAME
        if not path.is_file():
            return None
        tensors = load_tensors(path)
        if set(tensors) != _NAMES or tensors["references"].shape[1:] != tensors["mean"].shape:
            raise UserError(f"{path} is damaged; measure it again with `babydoctor eval RUN --familiarity`")
        return cls(tensors["mean"], tensors["scale"], tensors["references"], float(tensors["threshold"]))


@torch.inference_mode()
def describe_images(model: BabyDoctor, pixels: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of the patch features of each image, float32 ``[N, 2 D]``.

    Args:
        pixels: float32 ``[N, 3, S, S]``, normalized.
    """
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(model.device)
    features = patch_features(model.vision, batch, model.vision_layer).float()  # [N, P, D]
    return torch.cat([features.mean(1), features.std(1)], dim=1).cpu().numpy()


class DescribeJob:
    """Describes one image between the steps of running answers; see ``engine.core.Job``.

    Args:
        pixels: float32 ``[3, S, S]``, normalized.
    """

    def __init__(self, model: BabyDoctor, pixels: np.ndarray) -> None:
        self._model, self._pixels = model, pixels
        self.features: np.ndarray | None = None
        """float32 ``[1, 2 D]`` once the job has ended."""

    def run(self) -> Iterator[float]:
        self.features = describe_images(self._model, self._pixels[None])
        yield 1.0
