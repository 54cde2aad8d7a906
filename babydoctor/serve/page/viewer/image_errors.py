"""Errors of ``imaging`` -> errors of the web UI."""

from __future__ import annotations

from babydoctor.errors import UserErrorCode
from babydoctor.schema import UserError
from babydoctor.serve.page.study.stack import FILE_NAME
from babydoctor.serve.page.texts import PageError

_PAGE_CODES: dict[UserErrorCode, str] = {
    "image_too_large": "too_many_pixels",
    "image_bad_shape": "odd_shape",
    "dicom_without_image": "dicom_without_image",
    "dicom_without_decoder": "dicom_without_decoder",
    "image_decode_failed": "image_decode_failed",
    "image_decode_timeout": "image_decode_timeout",
    "image_decoder_down": "image_decode_failed",
}
"""Code of ``UserError`` -> code of ``PageError``."""


def picture_error(error: UserError, looks_like_image: bool) -> PageError:
    """The web UI's error for an error of ``load_image``."""
    code = _PAGE_CODES.get(error.code)
    return PageError(code or ("damaged_image" if looks_like_image else "not_an_image"))


def dicom_error(error: UserError) -> PageError:
    """The web UI's error for an error of ``read_dicom`` or ``render``."""
    if error.code == "dicom_unsupported":  # these messages quote only coded values of the file, no text
        return PageError("dicom_unsupported", detail=str(error).removeprefix(f"{FILE_NAME}: "))
    return PageError(_PAGE_CODES.get(error.code, "bad_dicom"))
