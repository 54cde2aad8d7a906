"""Limits of decoding, and the error for an image that is refused. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from babydoctor.errors import UserError, UserErrorCode

MAX_PIXELS = 50_000_000
"""Largest picture that is decoded: twice a mammogram's 4,728 x 5,928, and 150 MB as RGB."""

MAX_ASPECT = 64
"""Longest edge over shortest. Resizing a 50,000 x 1 strip by its shorter edge would need gigabytes."""

ORDINARY_PIXELS = 4_000_000
"""Pictures up to this size get ``DecodeLimits.seconds``; larger ones get more in proportion."""

ERROR_CODES: dict[UserErrorCode, str] = {
    "invalid_input": "a frame, window or preset that this image does not have",
    "image_missing": "the file does not exist or may not be read",
    "image_empty": "0 bytes",
    "image_unreadable": "not a supported image format, or damaged",
    "image_too_large": "more pixels than the limit",
    "image_bad_shape": "no pixels, or a very thin strip",
    "dicom_unreadable": "a damaged or contradictory DICOM file",
    "dicom_unsupported": "a compression, color space or pixel format of DICOM that is not supported",
    "dicom_without_image": "a DICOM object without pixel data",
    "dicom_without_decoder": "the package that decodes this compression is not installed",
    "image_decode_failed": "the decoding process died or needed too much memory",
    "image_decode_timeout": "decoding took longer than the limit",
    "image_decoder_down": "no decoding process can be started on this machine",
}
"""The codes of ``ImageError`` and their meanings."""


class ImageError(UserError):
    """An image that cannot be shown. Programs read ``code``, a key of ``ERROR_CODES``, and never the text."""

    def __init__(self, message: str, code: UserErrorCode) -> None:
        assert code in ERROR_CODES, code
        super().__init__(message, code=code)

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.code)


@dataclass(frozen=True)
class DecodeLimits:
    """Limits for decoding one image. Times and memory are for pictures of up to ``ORDINARY_PIXELS``.

    Larger pictures, up to ``max_pixels``, get ``seconds_per_megapixel`` more, and memory by ``memory_for``.
    """

    max_pixels: int = MAX_PIXELS
    seconds: float = 2.0
    seconds_per_megapixel: float = 0.25
    memory_bytes: int = 512 * 2**20

    def seconds_for(self, num_pixels: int) -> float:
        """CPU seconds for a picture of ``num_pixels``."""
        extra = max(0, min(num_pixels, self.max_pixels) - ORDINARY_PIXELS)
        return self.seconds + self.seconds_per_megapixel * extra / 1e6

    def memory_for(self, num_pixels: int, bytes_per_pixel: int) -> int:
        """Bytes of address space for a picture of ``num_pixels`` that needs ``bytes_per_pixel`` at the peak."""
        return self.memory_bytes + max(0, num_pixels - ORDINARY_PIXELS) * bytes_per_pixel


def check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ``ImageError`` for a picture that is too large, too thin or without pixels."""
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width} x {height})", "image_bad_shape")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} = {width * height:,} pixels; the limit is {max_pixels:,}. Scale it down first",
            "image_too_large",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: {width} x {height} is a strip; the longer edge may be {MAX_ASPECT} times the shorter",
            "image_bad_shape",
        )
