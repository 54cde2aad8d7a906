"""Unusual files in the web UI: reasons in words, warnings under the image, windows of any width."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.image_files import dicom, encapsulated

from babydoctor.imaging.limits import ImageError
from babydoctor.serve.page.scan import open_scan
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.settings import Limits
from babydoctor.serve.worker.preprocess import decode_limits, image_error

RAMP = np.array([[0, 100, 200, 300]], np.uint16)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            encapsulated([b"\0" * 16], "1.2.840.10008.1.2.4.102", Rows=16, Columns=16),
            "cannot read this compression: MPEG-4 AVC/H.264",
        ),
        (dicom(np.zeros((2, 2, 3), np.uint8), PhotometricInterpretation="HSV"), "'HSV' is not supported"),
    ],
)
def test_unreadable_files_are_named(data: bytes, words: str) -> None:
    with pytest.raises(PageError) as caught:
        open_scan(data)
    assert caught.value.code == "dicom_unsupported" and words in caught.value.sentence


def test_assumptions_are_shown_under_the_image() -> None:
    scan = open_scan(dicom(RAMP, SamplesPerPixel=None))
    assert "Note: SamplesPerPixel is missing; read as 1" in scan.view().caption
    assert "Note:" not in open_scan(dicom(RAMP)).view().caption


@pytest.mark.parametrize("slope", ["0.001", "1e-6", "1e-9"])
def test_values_far_below_one_can_be_windowed(slope: str) -> None:
    scan = open_scan(dicom(RAMP, Modality="MR", RescaleSlope=slope, RescaleIntercept="0"))
    at, before = scan.window_range(), scan.view().png
    top = 300 * float(slope)
    assert at.low <= 0 < top <= at.high and at.narrowest <= at.step < at.width < top * 1.01
    scan.center, scan.width = at.center, at.width  # the sliders are touched but not moved
    assert scan.view().png == before
    scan.width = at.narrowest
    assert scan.view().png != before


def test_a_header_of_millions_of_elements_is_refused_in_time() -> None:
    whole = dicom(RAMP)
    many = whole[:132] + whole[132:] + (b"\x11\x70\x01\x00UN\0\0" + b"\0" * 4) * 2_500_000
    with pytest.raises(PageError) as caught:
        open_scan(many)
    assert caught.value.code in ("image_decode_timeout", "image_decode_failed", "bad_dicom")


def test_errors_of_the_decoding_process_keep_their_code_over_http() -> None:
    for code, status, shown in (
        ("image_decode_timeout", 422, "image_decode_timeout"),
        ("image_decode_failed", 422, "image_decode_failed"),
        ("image_too_large", 413, "image_too_large"),
        ("dicom_unsupported", 422, "bad_image"),
    ):
        error = image_error(ImageError("scan: words", code), 1)
        assert (error.status, error.code, error.param) == (status, shown, "images[1]")
    limits = decode_limits(Limits(max_pixels=9, decode_seconds=3, decode_memory_bytes=5))
    assert (limits.max_pixels, limits.seconds, limits.memory_bytes) == (9, 3, 5)
