"""Does it look? The same questions with the right image, another case's, a blank one, and noise."""

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
    """The conditions in their order, "right" always among them. Raises UserError at an unknown name."""
    unknown = [name for name in names if name not in CONDITIONS]
    if unknown:
        raise UserError(f"--images-as {unknown[0]}: no such condition; there are {', '.join(CONDITIONS)}")
    return tuple(name for name in CONDITIONS if name == "right" or name in names)


def shuffle_images(image_keys: Sequence[str], seed: int) -> dict[str, str]:
    """Give every image another image: one random cycle through all of them (Sattolo), so that none keeps its own."""
    keys = sorted(set(image_keys))
    if len(keys) < 2:
        raise UserError(f"images cannot be shuffled: the questions have {len(keys)} image; leave out 'shuffled'")
    order = list(keys)
    generator = np.random.default_rng(seed)
    for place in range(len(order) - 1, 0, -1):
        other = int(generator.integers(0, place))
        order[place], order[other] = order[other], order[place]
    return dict(zip(keys, order, strict=True))


class ConditionedImages:
    """The pixels that a question is asked with under one condition.

    Blank is the tower's mean colour (all zeros after normalisation). Noise is uniform, drawn anew for each image
    from the seed and the image's name, so that a run repeats exactly.
    """

    def __init__(self, questions: Sequence[Question], condition: str, settings: ImageSettings, seed: int = 0) -> None:
        assert condition in CONDITIONS, condition
        self.condition = condition
        self.settings = settings
        self.seed = seed
        self._source = {q.image_key: q.image for q in questions if q.image is not None}
        self._other = shuffle_images(list(self._source), seed) if condition == "shuffled" else {}
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
            colours = np.random.default_rng(int.from_bytes(name[:8], "big")).random((3, size, size), np.float32)
            mean = np.array(self.settings.mean, np.float32)[:, None, None]
            std = np.array(self.settings.std, np.float32)[:, None, None]
            return (colours - mean) / std
        return self._load(self._other.get(question.image_key, question.image_key))

    def _read(self, image_key: str) -> np.ndarray:
        source = self._source[image_key]
        assert isinstance(source, (Path, bytes)), type(source)
        return to_pixels(load_image(source), self.settings)


def pixel_key(pixels: np.ndarray) -> str:
    """Name pixels by their content, for the engine's cache."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
