"""Errors are distinguished by their code, never by their message."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

import babydoctor
from babydoctor.errors import USER_ERROR_CODES, UserError
from babydoctor.imaging.load import load_image
from babydoctor.serve.api.errors import (
    API_CODES,
    ERROR_KINDS,
    ApiError,
    code_of_status,
    code_of_user_error,
    known_code,
)
from babydoctor.serve.page.viewer.image_errors import dicom_error, picture_error

PACKAGE = Path(babydoctor.__file__).parent


def test_every_code_has_a_kind_and_a_wrong_code_is_refused():
    assert set(ERROR_KINDS) == set(API_CODES)
    with pytest.raises(AssertionError):
        UserError("x", code="no_such_code")  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        ApiError("no_such_code", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("message", ["", "the limit is too large, a strip, holds no image, decoder is missing"])
@pytest.mark.parametrize(
    ("code", "status", "page_code"),
    [
        ("image_too_large", 413, "too_many_pixels"),
        ("image_bad_shape", 422, "odd_shape"),
        ("image_unreadable", 422, "damaged_image"),
    ],
)
def test_status_and_sentence_depend_on_the_code_alone(message: str, code: str, status: int, page_code: str):
    error = UserError(message, code=code)  # type: ignore[arg-type]
    assert ApiError(code_of_user_error(error), str(error)).status == status
    assert picture_error(error, looks_like_image=True).code == page_code


@pytest.mark.parametrize(
    ("code", "page_code"),
    [
        ("dicom_without_image", "dicom_without_image"),
        ("dicom_without_decoder", "dicom_without_decoder"),
        ("dicom_unreadable", "bad_dicom"),
    ],
)
def test_dicom_sentences_depend_on_the_code(code: str, page_code: str):
    assert dicom_error(UserError("the limit is too large", code=code)).code == page_code  # type: ignore[arg-type]


def _image(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image_empty"),
        (b"no image", "image_unreadable"),
        (_image(90, 90)[:60], "image_unreadable"),
        (_image(101, 100), "image_too_large"),
        (_image(100, 1), "image_bad_shape"),
        (bytes(128) + b"DICM", "dicom_without_image"),
    ],
)
def test_images_are_refused_with_their_code(data: bytes, code: str):
    with pytest.raises(UserError) as caught:
        load_image(data, max_pixels=10_000)
    assert caught.value.code == code


def test_a_missing_file_has_its_code(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_image(tmp_path / "none.png")
    assert caught.value.code == "image_missing"


def test_other_servers_codes_become_ours():
    assert known_code("queue_full") == "queue_full" and known_code("their_own") == "worker_failed"
    statuses = {429: "queue_full", 401: "worker_refused", 502: "worker_lost", 500: "worker_failed"}
    assert {status: code_of_status(status) for status in statuses} == statuses


def test_exit_statuses():
    assert {UserError("x", code=code).exit_status for code in USER_ERROR_CODES} == {2, 3, 4}
    assert UserError("x").exit_status == 2


def test_the_serving_guide_lists_every_code_correctly():
    guide = (PACKAGE / "serve" / "README.md").read_text(encoding="utf-8")
    table = guide.partition("<!-- error codes -->\n")[2].partition("<!-- end of error codes -->")[0]
    rows = [f"| `{code}` | {kind.status} | {kind.error_code} | {kind.meaning} |" for code, kind in ERROR_KINDS.items()]
    assert table.splitlines()[2:] == rows
