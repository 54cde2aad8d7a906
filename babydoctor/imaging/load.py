"""Decode an image file or bytes into an RGB picture in this process; ``isolation`` does so in a separate process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from babydoctor.imaging.dicom import DicomImage, is_dicom, read_dicom, render
from babydoctor.imaging.limits import MAX_PIXELS, ImageError
from babydoctor.imaging.pictures import Picture, decode_picture, open_picture

__all__ = ["ImageHeader", "decode", "is_dicom", "load_image", "log_warnings", "read_header", "read_source"]

logger = logging.getLogger(__name__)


def load_image(source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG, DICOM, WebP, GIF, BMP or TIFF into an upright RGB picture.

    The format is recognized by content, never by name. Of a DICOM file, the first frame is shown under its first window
    (see ``dicom.render`` for others); of an animation, the first picture. Samples of more than 8 bits are shown between
    percentiles 0.5 and 99.5, transparency is laid over black, and EXIF orientation is applied.
    ``image.info["warnings"]`` lists what was unclear in a DICOM file and how it was interpreted. It is also logged.

    Raises:
        ImageError: the file is missing, is not an image, is damaged, or has more than ``max_pixels`` pixels. Sizes are
            checked before anything is decoded.
    """
    name, data = read_source(source, name)
    image = decode(read_header(data, name, max_pixels), max_pixels)
    log_warnings(image, name)
    return image


@dataclass(frozen=True)
class ImageHeader:
    """Facts that are known before decoding. ``bytes_per_pixel`` estimates the peak memory of decoding."""

    width: int
    height: int
    bytes_per_pixel: int
    content: DicomImage | Picture = field(repr=False)

    @property
    def num_pixels(self) -> int:
        return self.width * self.height


def read_header(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Size and memory need of an image, from its header alone.

    Raises:
        ImageError: it is not an image, its header is damaged, or it is too large.
    """
    if not data:
        raise ImageError(f"{name}: the image is empty (0 bytes)", "image_empty")
    if not is_dicom(data):
        picture = open_picture(data, name, max_pixels)
        return ImageHeader(*picture.image.size, 48 if picture.is_wide else 20, picture)
    dicom = read_dicom(data, name=name, max_pixels=max_pixels)
    per_sample = {1: 12, 8: 12, 16: 20, 32: 56, 64: 72}[dicom.layout.bits_allocated]
    return ImageHeader(dicom.columns, dicom.rows, per_sample * (2 if dicom.layout.samples == 3 else 1), dicom)


def decode(header: ImageHeader, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture that belongs to a header. Raises ``ImageError`` if it cannot be decoded."""
    if isinstance(header.content, Picture):
        return decode_picture(header.content)
    return render(header.content, max_pixels=max_pixels)


def log_warnings(image: Image.Image, name: str) -> None:
    """Log the warnings about a picture."""
    for warning in image.info.get("warnings", ()):
        logger.warning("%s: %s", name, warning)


def read_source(source: str | Path | bytes, name: str = "") -> tuple[str, bytes]:
    """(Name for messages, content) of a file or of bytes. Raises ``ImageError`` if the file cannot be read."""
    if isinstance(source, bytes):
        return name or f"image of {len(source)} bytes", source
    name = name or str(source)
    try:
        return name, Path(source).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such image file", "image_missing") from None
    except OSError as error:
        raise ImageError(
            f"{name}: cannot be read ({error.strerror}); check that this user may read it", "image_missing"
        ) from error
