"""Image conditions: the same questions with the right image, with another case's, with a blank image and with noise.

A model that scores as well without the right image does not use it.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from babydoctor.eval.tasks import Question
from babydoctor.imaging.isolation import load_image
from babydoctor.imaging.preprocess import ImageSettings, to_pixels
from babydoctor.schema import UserError

CONDITIONS = ("right", "shuffled", "blank", "noise")
_KEPT_IMAGES = 64

MEAN_COLOR = (123, 117, 104)
"""CLIP's mean color, of 255."""

FILE_EDGE = 336
"""Edge of blank and noisy image files in pixels."""

Form = TypeVar("Form")


def check_conditions(names: Sequence[str]) -> tuple[str, ...]:
    """The conditions in canonical order, always including "right".

    Raises:
        UserError: a name is unknown.
    """
    unknown = [name for name in names if name not in CONDITIONS]
    if unknown:
        raise UserError(f"--images-as {unknown[0]}: no such condition; there are {', '.join(CONDITIONS)}")
    return tuple(name for name in CONDITIONS if name == "right" or name in names)


def condition_label(condition: str, num_images: int) -> str:
    """The name of a condition for people, such as "right image"."""
    return f"{condition} image" if num_images else "no image"


def shuffle_images(image_keys: Sequence[str], seed: int) -> dict[str, str]:
    """Map every image to another one: a random cycle through all images (Sattolo), so no image is mapped to itself.

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


class ImageCondition(ABC, Generic[Form]):
    """The image for each question under one image condition, in the form that the asked model takes.

    Noise is seeded by the image's name, so a run is reproducible.
    """

    def __init__(self, questions: Sequence[Question], condition: str, seed: int = 0) -> None:
        assert condition in CONDITIONS, condition
        self.condition = condition
        self.seed = seed
        self._source = {q.image_key: q.image for q in questions if q.image is not None}
        self._other: dict[str, dict[str, str]] = {}
        if condition == "shuffled":
            for group in {question.shuffled_among for question in questions}:
                keys = [q.image_key for q in questions if q.image is not None and group in ("", q.shuffled_among)]
                # A short test may have too few images in a group.
                self._other[group] = shuffle_images(keys if len(set(keys)) > 1 else list(self._source), seed)
        self._load = lru_cache(maxsize=_KEPT_IMAGES)(self._read)

    def image(self, question: Question) -> Form | None:
        """The image, or None for a question without one."""
        if question.image is None:
            return None
        if self.condition == "blank":
            return self.blank()
        if self.condition == "noise":
            name = hashlib.sha256(f"{self.seed}:{question.image_key}".encode()).digest()
            return self.noise(np.random.default_rng(int.from_bytes(name[:8], "big")))
        return self._load(self._key(question))

    def name(self, question: Question) -> tuple[str, str]:
        """Names the image of a question. The same name, under any condition, means the same image."""
        if question.image is None:
            return "none", ""
        if self.condition == "blank":
            return "blank", ""
        if self.condition == "noise":
            return "noise", question.image_key
        return "image", self._key(question)

    def _key(self, question: Question) -> str:
        others = self._other.get(question.shuffled_among, {})
        return others.get(question.image_key, question.image_key)

    def _read(self, image_key: str) -> Form:
        source = self._source[image_key]
        assert isinstance(source, (Path, bytes)), type(source)
        return self.convert(load_image(source))

    @abstractmethod
    def convert(self, picture: Image.Image) -> Form:
        """A loaded picture."""

    @abstractmethod
    def blank(self) -> Form:
        """An image of the tower's mean color."""

    @abstractmethod
    def noise(self, generator: np.random.Generator) -> Form:
        """Uniform noise."""


class ConditionedImages(ImageCondition[np.ndarray]):
    """Images as normalized pixels, float32 ``[3, S, S]``. The mean color is zero after normalization."""

    def __init__(self, questions: Sequence[Question], condition: str, settings: ImageSettings, seed: int = 0) -> None:
        super().__init__(questions, condition, seed)
        self.settings = settings

    def pixels(self, question: Question) -> np.ndarray | None:
        """float32 ``[3, S, S]``, or None for a question without an image."""
        return self.image(question)

    def convert(self, picture: Image.Image) -> np.ndarray:
        return to_pixels(picture, self.settings)

    def blank(self) -> np.ndarray:
        return np.zeros((3, self.settings.size, self.settings.size), np.float32)

    def noise(self, generator: np.random.Generator) -> np.ndarray:
        colors = generator.random((3, self.settings.size, self.settings.size), np.float32)
        mean = np.array(self.settings.mean, np.float32)[:, None, None]
        std = np.array(self.settings.std, np.float32)[:, None, None]
        return (colors - mean) / std


class ConditionedFiles(ImageCondition[bytes]):
    """Images as PNG files, for a server that does its own preprocessing."""

    def convert(self, picture: Image.Image) -> bytes:
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()

    def blank(self) -> bytes:
        return self.convert(Image.new("RGB", (FILE_EDGE, FILE_EDGE), MEAN_COLOR))

    def noise(self, generator: np.random.Generator) -> bytes:
        return self.convert(Image.fromarray(generator.integers(0, 256, (FILE_EDGE, FILE_EDGE, 3), np.uint8)))
