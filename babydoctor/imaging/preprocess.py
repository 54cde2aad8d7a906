"""RGB picture -> pixels for the vision tower.

Two modes make a picture square. ``square`` does what CLIP's processor does: it resizes the shorter edge and crops the
rest away. ``pad`` adds borders in the mean color, so nothing of a scan is lost. Both give the pixels of the original
LLaVA code (``CLIPImageProcessor`` of transformers 4.37 and LLaVA's ``expand2square``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from babydoctor.hub import model_directory
from babydoctor.schema import UserError

ImageMode = Literal["square", "pad"]

# A picture with a longer edge is shrunk before padding, because the padded square would not fit in memory.
_MAX_PADDED_EDGE = 4096


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become pixels. Stored in the run's manifest, so that serving does the same as training.

    ``size`` is the edge of the square in pixels; ``mean`` and ``std`` are per RGB channel on a scale of 0 to 1.
    """

    size: int
    mode: ImageMode
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Turn JSON's lists into tuples and refuse invalid values."""
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.mode not in ("square", "pad"):
            raise UserError(f"image mode {self.mode!r}: must be 'square' or 'pad'")
        if self.size < 1:
            raise UserError(f"image size {self.size}: must be at least 1 pixel")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"image mean {self.mean} and std {self.std}: three numbers each, std above 0")

    @classmethod
    def from_processor_dir(cls, path: str | Path, mode: ImageMode) -> ImageSettings:
        """Read the settings that belong to a vision tower.

        ``path`` is a model directory or a hub id. Reads ``preprocessor_config.json``, or transformers' newer
        ``processor_config.json`` that holds the same under ``image_processor``.

        Raises:
            UserError: the settings are missing, or not those of a CLIP image processor.
        """
        file, config = _read_processor_config(path)
        size, crop = _edge(config.get("size")), _edge(config.get("crop_size"))
        if size is None or "image_mean" not in config or "image_std" not in config:
            raise UserError(f"{file}: needs size, image_mean and image_std; is this a CLIP image processor?")
        if config.get("do_center_crop", True) and crop is not None and crop != size:
            raise UserError(f"{file}: crop_size {crop} differs from size {size}; only equal sizes are supported")
        for key, expected in (("resample", 3), ("do_rescale", True), ("do_normalize", True), ("do_resize", True)):
            if config.get(key, expected) != expected:
                raise UserError(f"{file}: {key} is {config[key]!r}; only CLIP's {expected!r} is supported")
        return cls(size=size, mode=mode, mean=config["image_mean"], std=config["image_std"])


def _edge(value: Any) -> int | None:
    """The edge in pixels from any of the forms that processor configs have had; None if there is none."""
    if isinstance(value, dict):
        edges = {int(v) for k, v in value.items() if k in ("shortest_edge", "height", "width") and v is not None}
        return edges.pop() if len(edges) == 1 else None
    return int(value) if isinstance(value, (int, float)) else None


def _read_processor_config(path: str | Path) -> tuple[str, dict[str, Any]]:
    names = ("preprocessor_config.json", "processor_config.json")
    folder = model_directory(path, weights=False)
    for name in names:
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            nested = config.get("image_processor", config)
            if "image_mean" in nested:
                return str(folder / name), cast("dict[str, Any]", nested)
    raise UserError(f"{folder}: holds neither {names[0]} nor {names[1]} with image_mean; copy it from the tower")


def to_pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """RGB picture -> normalized pixels, float32 ``[3, S, S]``.

    Equal to transformers 4.37's ``CLIPImageProcessor`` (``square``) and to LLaVA's ``expand2square`` followed by it
    (``pad``) to 1e-5.
    """
    assert image.mode == "RGB", f"to_pixels wants RGB, got {image.mode}; use load_image"
    if settings.mode == "pad":
        image = _pad_to_square(image, settings)
    image = _resize_and_crop(image, settings.size)
    values, planes = _values(settings), np.asarray(image)
    return np.stack([values[channel][planes[..., channel]] for channel in range(3)])


@lru_cache(maxsize=16)
def _values(settings: ImageSettings) -> np.ndarray:
    """The normalized value of each of the 256 levels per channel: float32 ``[3, 256]``."""
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)  # 4.37 multiplies in float64, then rounds
    mean, std = (np.asarray(x, np.float32)[:, None] for x in (settings.mean, settings.std))
    return cast("np.ndarray", (levels - mean) / std)


def _pad_to_square(image: Image.Image, settings: ImageSettings) -> Image.Image:
    if max(image.size) > _MAX_PADDED_EDGE:
        image = image.copy()
        image.thumbnail((_MAX_PADDED_EDGE, _MAX_PADDED_EDGE), Image.Resampling.BICUBIC)
    edge = max(image.size)
    if image.size == (edge, edge):
        return image
    red, green, blue = (int(value * 255) for value in settings.mean)
    square = Image.new("RGB", (edge, edge), (red, green, blue))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter edge to ``size`` (bicubic) and crop the central ``size`` x ``size``."""
    short, long = sorted(image.size)
    resized_long = int(size * long / short)
    width, height = (size, resized_long) if image.width <= image.height else (resized_long, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
