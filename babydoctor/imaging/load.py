"""Image file or bytes -> checked RGB picture, in this process. ``isolation`` does the same in a process of its own."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from babydoctor.imaging.containers import picture_format
from babydoctor.imaging.dicom import read_dicom, render
from babydoctor.imaging.dicom_file import is_dicom
from babydoctor.imaging.limits import MAX_PIXELS, ImageError
from babydoctor.imaging.pictures import decode_picture

__all__ = ["MAX_PIXELS", "is_dicom", "load_image", "read_source"]

logger = logging.getLogger(__name__)


def load_image(source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG, DICOM, WebP, GIF, BMP or TIFF into an upright RGB picture.

    The format is told by content, never by name. A DICOM file shows its first frame under its first window (see
    ``dicom.render`` for others), an animation its first picture. Samples of more than 8 bits are shown between
    percentiles 0.5 and 99.5, transparency is laid over black, and EXIF orientation is applied.
    ``image.info["warnings"]`` lists what was doubtful about a DICOM file and how it was read; it is logged, too.

    Raises:
        ImageError: the file is missing, is no image, is damaged, or has more than ``max_pixels`` pixels. Sizes are
            checked before anything is decoded.
    """
    name, data = read_source(source, name)
    image = decode_bytes(data, name, max_pixels)
    log_warnings(image, name)
    return image


def decode_bytes(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """``load_image`` without the file and without logging."""
    if not data:
        raise ImageError(f"{name}: the image is empty (0 bytes)", "image_damaged")
    if is_dicom(data):
        return render(read_dicom(data, name=name, max_pixels=max_pixels), max_pixels=max_pixels)
    return decode_picture(data, name, max_pixels)


def log_warnings(image: Image.Image, name: str) -> None:
    """Log what was doubtful about a picture."""
    for warning in image.info.get("warnings", ()):
        logger.warning("%s: %s", name, warning)


def read_source(source: str | Path | bytes, name: str = "") -> tuple[str, bytes]:
    """(Name for messages, content) of a file or of bytes. Raises ``ImageError`` where the file cannot be read."""
    if isinstance(source, bytes):
        return name or f"image of {len(source)} bytes", source
    name = name or str(source)
    try:
        return name, Path(source).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such image file", "image_missing") from None
    except OSError as error:
        raise ImageError(
            f"{name}: cannot be read ({error.strerror}); check that this user may read it", "image_unreadable"
        ) from error


def has_picture_magic(data: bytes) -> bool:
    """Whether the content begins like a picture file that is read here."""
    return picture_format(data) is not None
