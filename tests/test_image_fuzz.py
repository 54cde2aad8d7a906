"""Damaged files of every container and codec give a picture or an ``ImageError``, in bounded time and memory.

Seeded. ``BABYDOCTOR_FUZZ=20000`` tests that many files instead of a few hundred. Each takes about 3 ms, or up to the
limit if it keeps a decoder busy.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.image_files import damage, dicom, png, tiff
from helpers.processes import resident_bytes
from PIL import Image
from pydicom.data import get_testdata_file

from babydoctor.imaging import isolation
from babydoctor.imaging.isolation import DecodePool
from babydoctor.imaging.limits import ERROR_CODES, DecodeLimits, ImageError

NUM_FILES = int(os.environ.get("BABYDOCTOR_FUZZ", "400"))

LIMITS = DecodeLimits(max_pixels=4_000_000, seconds=0.5)

# One file of pydicom for each transfer syntax, color space and unusual header.
DICOM_FILES = (
    *("CT_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless", "image_dfl"),
    *(
        "MR_small_jpeg_ls_lossless",
        "JPGExtended",
        "SC_rgb_jpeg_dcmtk",
        "JPEG2000",
        "SC_rgb_jpeg_gdcm",
        "SC_rgb_small_odd",
    ),
    *("examples_palette", "examples_ybr_color", "examples_jpeg2k", "SC_ybr_full_422_uncompressed", "rtdose"),
    *(
        "SC_rgb_rle_16bit",
        "JPEGLSNearLossless_16",
        "rtdose_rle",
        "liver_1frame",
        "SC_rgb_jls_lossy_line",
        "examples_overlay",
    ),
)


def seeds() -> dict[str, bytes]:
    """Whole files to damage, by name."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
    found: dict[str, bytes] = {}
    image = Image.fromarray(noise)
    plain = ("JPEG", "WEBP", "GIF", "BMP", "PNG")
    variants: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {}) for kind in plain}
    variants |= {"progressive JPEG": ("JPEG", {"progressive": True}), "lossless WEBP": ("WEBP", {"lossless": True})}
    for how in ("raw", "tiff_lzw", "packbits", "jpeg", "group4"):
        variants[f"TIFF {how}"] = ("TIFF", {"compression": how})
    for name, (kind, options) in variants.items():
        file = io.BytesIO()
        (image.convert("1") if "group4" in name else image).save(file, kind, **options)
        found[name] = file.getvalue()
    wide = rng.integers(0, 65536, (12, 14, 3), dtype=np.uint16)
    found |= {"RGB16 PNG": png(wide, 2, 16), "RGB16 TIFF": tiff(wide, 2)}
    found["float TIFF"] = tiff(wide[..., 0] / np.float32(7), 0)
    found["made DICOM"] = dicom(wide[..., 0], BitsStored=12, HighBit=15, WindowCenter="9", WindowWidth="900")
    for name in DICOM_FILES:
        path = get_testdata_file(f"{name}.dcm", download=False)
        if path:
            found[name] = Path(str(path)).read_bytes()
    return found


def test_damaged_files_only_cause_an_error() -> None:
    files, rng = seeds(), np.random.default_rng(int(os.environ.get("BABYDOCTOR_FUZZ_SEED", "0")))
    names = sorted(files)
    assert len(names) > 30
    pool, outcomes = DecodePool(size=1), dict[str, int]()
    resident: list[int] = []
    try:
        for index in range(NUM_FILES):
            name = names[index % len(names)]
            started = time.monotonic()
            try:
                values, _ = pool.decode(damage(files[name], rng), name, {}, LIMITS)
                outcome = "picture"
                assert values.dtype == np.uint8 and values.shape[0] * values.shape[1] <= LIMITS.max_pixels
            except ImageError as error:
                outcome = error.code
                assert outcome in ERROR_CODES and str(error).startswith(f"{name}: "), (name, str(error))
                assert len(str(error)) < 800
            assert time.monotonic() - started < 60, (name, index)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if index % 50 == 49:
                resident.append(resident_bytes(os.getpid()))
    finally:
        pool.close()
    print(f"\n{NUM_FILES:,} damaged files: {outcomes}")
    assert outcomes["picture"] > NUM_FILES // 20 and len(outcomes) >= 3
    if len(resident) > 4:
        assert resident[-1] - resident[len(resident) // 2] < 64 * 2**20, "this process grows with each file"


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 8, 11, 12, 16, 33, 64, 131, 132, 133, 140])
def test_truncated_files_are_refused(length: int) -> None:
    for name, data in seeds().items():
        with pytest.raises(ImageError):
            isolation.load_image(data[:length], name=name)
