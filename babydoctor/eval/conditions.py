"""Image conditions: the same questions with the right image, with another case's, with a blank image and with noise.

A model that scores as well without the right image does not use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from babydoctor.eval.tasks import Question
from babydoctor.imaging.isolation import load_image
from babydoctor.imaging.preprocess import ImageSettings, to_pixels
from babydoctor.schema import UserError

CONDITIONS = ("right", "shuffled", "blank", "noise")
_KEPT_IMAGES = 64


def check_conditions(names: Sequence[str]) -> tuple[str, ...]:
    """The conditions in canonical order, always including "right".

    Raises:
        UserError: a name is unknown.
    """
    unknown = [name for name in names if name not in CONDITIONS]
    if unknown:
        raise UserError(f"--images-as {unknown[0]}: no such condition; there are {', '.join(CONDITIONS)}")
    return tuple(name for name in CONDITIONS if name == "right" or name in names)


def shuffle_images(image_keys: Sequence[str], seed: int) -> dict[str, str]:
    """Map every image to another one: a random cycle through all images (Sattolo), so no image keeps its place.

    Raises:
        UserError: there are fewer than two images.
    """
    keys = sorted(set(image_keys))
    if len(keys) < 2:
        raise UserError(f"images cannot be shuffled: the questions have {len(keys)} image; leave out 'shuffled'")
    order = list(keys)
    generator = np.random.default_rng(seed)
    for index in range(len(order) - 1, 0, -1):
        other = int(generator.integers(0, index))
        order[index], order[other] = order[other], order[index]
    return dict(zip(keys, order, strict=True))


class ConditionedImages:
    """The pixels for each question under one image condition.

    Blank is the tower's mean color (zeros after normalization). Noise is uniform and seeded by the image's name, so a
    run is reproducible.
    """

    def __init__(self, questions: Sequence[Question], condition: str, settings: ImageSettings, seed: int = 0) -> None:
        assert condition in CONDITIONS, condition
        self.condition = condition
        self.settings = settings
        self.seed = seed
        self._source = {q.image_key: q.image for q in questions if q.image is not None}
        self._other: dict[str, dict[str, str]] = {}
        if condition == "shuffled":
            for group in {question.shuffled_among for question in questions}:
                keys = [q.image_key for q in questions if q.image is not None and group in ("", q.shuffled_among)]
                # A short test may have too few images in a group.
                self._other[group] = shuffle_images(keys if len(set(keys)) > 1 else list(self._source), seed)
        self._load = lru_cache(maxsize=_KEPT_IMAGES)(self._read)

    def pixels(self, question: Question) -> np.ndarray | None:
        """float32 ``[3, S, S]``, or None for a question without an image."""
        if question.image is None:
            return None
        size = self.settings.size
        if self.condition == "blank":
            return np.zeros((3, size, size), np.float32)
        if self.condition == "noise":
            name = hashlib.sha256(f"{self.seed}:{question.image_key}".encode()).digest()
            colors = np.random.default_rng(int.from_bytes(name[:8], "big")).random((3, size, size), np.float32)
            mean = np.array(self.settings.mean, np.float32)[:, None, None]
            std = np.array(self.settings.std, np.float32)[:, None, None]
            return (colors - mean) / std
        others = self._other.get(question.shuffled_among, {})
        return self._load(others.get(question.image_key, question.image_key))

    def _read(self, image_key: str) -> np.ndarray:
        source = self._source[image_key]
        assert isinstance(source, (Path, bytes)), type(source)
        return to_pixels(load_image(source), self.settings)
