"""Encoded image -> checked RGB picture -> pixels for the vision tower.

Two ways of making a picture square. ``square`` is what CLIP's processor does: the shorter edge is resized and the
rest is cropped away. ``pad`` letterboxes with the mean colour, so that nothing of a scan is lost. Both give the
pixels of the original LLaVA code (``CLIPImageProcessor`` of transformers 4.37 and LLaVA's ``expand2square``).
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from babydoctor.schema import UserError

ImageMode = Literal["square", "pad"]

MAX_PIXELS = 50_000_000
"""Largest picture that is decoded: twice a mammogram's 4,728 x 5,928, and 150 MB as RGB."""

MAX_ASPECT = 64
"""Longest edge over shortest. Resizing by the shorter edge would blow a 50,000 x 1 strip up to gigabytes."""

# What Pillow may try. Its other decoders (EPS, PSD, FITS, ...) are not needed and only widen the attack surface.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# Above this edge a picture is shrunk before it is padded: the padded square would not fit in memory.
_MAX_PADDED_EDGE = 4096


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become pixels. Stands in the run's manifest, so that serving repeats what training did.

    ``size`` is the edge of the square in pixels; ``mean`` and ``std`` are per RGB channel on a scale of 0 to 1.
    """

    size: int
    mode: ImageMode
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Turn JSON's lists into tuples and refuse what cannot be meant."""
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

        ``path`` is a model folder or a hub id. Reads ``preprocessor_config.json``, or transformers' newer
        ``processor_config.json`` that holds the same under ``image_processor``.
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
    folder = Path(path)
    if not folder.is_dir():
        folder = _download_processor_config(str(path), names)
    for name in names:
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            nested = config.get("image_processor", config)
            if "image_mean" in nested:
                return str(folder / name), cast("dict[str, Any]", nested)
    raise UserError(f"{folder}: holds neither {names[0]} nor {names[1]} with image_mean; copy it from the tower")


def _download_processor_config(hub_id: str, names: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download

    for name in names:
        try:
            return Path(hf_hub_download(hub_id, name)).parent
        except Exception as error:  # not found, offline, no such repository: all mean "not here"
            last = error
    raise UserError(
        f"{hub_id}: neither a folder nor a model on the hub that can be reached ({type(last).__name__}); "
        "give the folder of the vision tower"
    )


def is_dicom(data: bytes, name: str = "") -> bool:
    """Tell DICOM by its magic bytes; files without the preamble by their name or their first tag (0008,xxxx)."""
    if data[128:132] == b"DICM":
        return True
    if name.lower().endswith((".dcm", ".dicom")):
        return True
    return data[:2] == b"\x08\x00" and data[3:4] == b"\x00"


def load_image(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG, DICOM, WebP, GIF, BMP or TIFF into an upright RGB picture.

    The kind is told by content, not by name. Of a DICOM file the first frame is shown under its first window
    (see ``dicom.render`` for others), of an animation the first picture. 16-bit greyscale is stretched from its
    own minimum to its maximum; transparency is laid over black; EXIF orientation is applied.

    Raises ``UserError`` where the file is missing, is no image, is cut off, or has more than ``max_pixels``
    pixels; sizes are checked before anything is decoded.
    """
    if isinstance(source, bytes):
        name, data = f"image of {len(source)} bytes", source
    else:
        name = str(source)
        try:
            data = Path(source).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{name}: no such image file", code="image_missing") from None
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})", code="image_missing") from error
    if not data:
        raise UserError(f"{name}: the image is empty (0 bytes)", code="image_empty")
    if is_dicom(data, name if not isinstance(source, bytes) else ""):
        from babydoctor.imaging.dicom import read_dicom, render  # imports this module, and pydicom is slow to load

        return render(read_dicom(data, name=name, max_pixels=max_pixels))
    return _decode(data, name, max_pixels)


def _decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: too large to decode safely ({error})", code="image_too_large") from error
    except Exception as error:  # Pillow's header parsers raise nearly anything on damaged files
        raise UserError(
            f"{name}: not a PNG, JPEG, DICOM, WebP, GIF, BMP or TIFF image ({_short(error)})", code="image_unreadable"
        ) from error
    check_size(image.width, image.height, name, max_pixels)
    try:
        image.load()
        return _to_rgb(image)
    except Exception as error:  # the same holds for its decoders
        raise UserError(
            f"{name}: the {image.format} image is damaged or cut off ({_short(error)})", code="image_unreadable"
        ) from error


def check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ``UserError`` for a picture too large, too thin or without pixels."""
    if width < 1 or height < 1:
        raise UserError(f"{name}: has no pixels ({width} x {height})", code="image_unreadable")
    if width * height > max_pixels:
        raise UserError(
            f"{name}: {width} x {height} = {width * height:,} pixels; the limit is {max_pixels:,}. Scale it down first",
            code="image_too_large",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{name}: {width} x {height} is a strip; the longer edge may be {MAX_ASPECT} times the shorter",
            code="image_bad_shape",
        )


def _short(error: Exception) -> str:
    """The first line of a library's message, without the memory address that Pillow likes to print."""
    if isinstance(error, UnidentifiedImageError) or not str(error):
        return type(error).__name__
    return str(error).splitlines()[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return _stretch(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Dropping alpha, as convert("RGB") does, would show whatever colour lies under transparent pixels.
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float greyscale -> RGB. Scanners use 10 to 16 bits of it, so the full scale says nothing."""
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    scaled = np.nan_to_num((values - low) / max(high - low, 1e-12), nan=0.0, posinf=1.0, neginf=0.0)
    return Image.fromarray((scaled.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")


def to_pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """RGB picture -> normalised pixels, float32 ``[3, S, S]``.

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
    """What each of a channel's 256 levels becomes: float32 ``[3, 256]``."""
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
    """Bicubic to ``size`` on the shorter edge, then the middle ``size`` x ``size``."""
    short, long = sorted(image.size)
    resized_long = int(size * long / short)
    width, height = (size, resized_long) if image.width <= image.height else (resized_long, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
