"""Decoding in separate processes: the same pictures, and a bad file only affects its own request."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import dicom, png, png_chunk
from PIL import Image
from pydicom.data import get_testdata_file

from babydoctor.imaging import isolation
from babydoctor.imaging.dicom import read_dicom
from babydoctor.imaging.dicom import render as render_here
from babydoctor.imaging.isolation import DecodePool
from babydoctor.imaging.limits import DecodeLimits, ImageError
from babydoctor.imaging.load import load_image as load_here
from babydoctor.imaging.preprocess import ImageSettings, to_pixels

SETTINGS = ImageSettings(32, "pad", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SHORT = DecodeLimits(seconds=0.5)


def jpeg(edge: int = 512) -> bytes:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (edge // 8, edge // 8, 3), dtype=np.uint8)).resize((edge, edge)).save(
        file, "JPEG"
    )
    return file.getvalue()


def bomb(edge: int, depth: int = 8, color_type: int = 2) -> bytes:
    """A black PNG of a few kilobytes."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    packer = zlib.compressobj(9)
    row = bytes(1 + edge * channels * depth // 8)
    data = b"".join(packer.compress(row) for _ in range(edge)) + packer.flush()
    header = struct.pack(">IIBBBBB", edge, edge, depth, color_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_pictures_equal_those_of_this_process(tmp_path: Path) -> None:
    deep = np.arange(5000, dtype=np.uint16).reshape(50, 100)
    files = [
        jpeg(),
        png(deep, 0, 16),
        dicom(deep),
        Path(str(get_testdata_file("examples_palette.dcm", download=False))),
    ]
    for source in files:
        here, there = load_here(source), isolation.load_image(source)
        assert there.tobytes() == here.tobytes() and there.size == here.size
        assert there.info.get("window") == here.info.get("window")
        np.testing.assert_array_equal(isolation.load_pixels(source, SETTINGS), to_pixels(here, SETTINGS))
    scan = read_dicom(dicom(deep))
    there = isolation.render(scan, center=100, width=50)
    assert there.tobytes() == render_here(scan, center=100, width=50).tobytes() and "chosen" in there.info["window"]
    assert isolation.load_image(dicom(deep, SamplesPerPixel=None)).info["warnings"] == (
        "SamplesPerPixel is missing; read as 1",
    )


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image_empty"),
        (b"<html>", "image_unreadable"),
        (jpeg()[:500], "image_unreadable"),
        (bomb(8000), "image_too_large"),
        (dicom(np.zeros((2, 2, 3), np.uint8), PhotometricInterpretation="HSV"), "dicom_unsupported"),
    ],
)
def test_refusals_keep_their_code_and_message(data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as there:
        isolation.load_image(data, name="scan")
    with pytest.raises(ImageError) as here:
        load_here(data, name="scan")
    assert (there.value.code, str(there.value)) == (here.value.code, str(here.value)) == (code, str(here.value))


def test_a_missing_frame_or_window_is_named() -> None:
    with pytest.raises(ImageError, match="frame 7 does not exist"):
        isolation.render(read_dicom(dicom(np.zeros((4, 4), np.uint8))), frame=7)


def test_a_frame_that_never_ends_fails_only_its_own_request(shared_dir: Path) -> None:
    _hangs(_case(shared_dir, "hang_jls.dcm"))


def test_a_box_without_a_length_is_refused_before_anything_can_loop(shared_dir: Path) -> None:
    with pytest.raises(ImageError, match="a box of the JPEG 2000 file has no length"):
        isolation.load_image(_case(shared_dir, "hang_j2k.dcm"), limits=SHORT)


def _case(shared_dir: Path, name: str) -> bytes:
    path = shared_dir / "cases" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path.read_bytes()


def test_a_picture_that_takes_too_long_fails_only_its_own_request() -> None:
    _hangs(bomb(2000, 16), DecodeLimits(seconds=0.02))


def _hangs(data: bytes, limits: DecodeLimits = SHORT) -> None:
    pool = DecodePool(size=1)
    try:
        picture = png(np.zeros((4, 4, 3), np.uint8), 2, 8)
        pool.decode(picture, "good", {}, SHORT)
        before = pool._idle[0].pid
        with pytest.raises(ImageError, match="hostile: decoding took longer than the limit of") as caught:
            pool.decode(data, "hostile", {}, limits)
        assert caught.value.code == "image_decode_timeout"
        pool.decode(picture, "good", {}, SHORT)  # in a new process
        assert pool._idle[0].pid != before
        with pytest.raises(ProcessLookupError):
            os.kill(before, 0)
    finally:
        pool.close()


def test_a_process_that_dies_is_replaced() -> None:
    pool = DecodePool(size=1)
    try:
        pool.decode(jpeg(64), "good", {}, SHORT)
        os.kill(pool._idle[0].pid, 9)
        with pytest.raises(ImageError, match="crashed") as caught:
            pool.decode(jpeg(64), "unlucky", {}, SHORT)
        assert caught.value.code == "image_decode_failed"
        values, _ = pool.decode(jpeg(64), "good", {}, SHORT)
        assert values.shape == (64, 64, 3)
    finally:
        pool.close()


def test_memory_beyond_the_limit_is_an_error() -> None:
    with pytest.raises(ImageError, match="needs more memory than allowed") as caught:
        isolation.load_image(bomb(1900, 16), limits=DecodeLimits(memory_bytes=8 * 2**20))
    assert caught.value.code == "image_decode_failed"
    assert isolation.load_image(bomb(1900, 16)).size == (1900, 1900)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "color_type"), [(8, 2), (16, 0)])
def test_a_small_file_of_49_megapixels_stays_within_its_limits(depth: int, color_type: int) -> None:
    data = bomb(7000, depth, color_type)
    assert len(data) < 400_000
    started = time.process_time()
    pixels = isolation.load_pixels(data, SETTINGS)
    assert pixels.shape == (3, 32, 32) and time.process_time() - started < 5  # the work is not done here


def test_large_images_wait_for_memory_and_all_are_decoded() -> None:
    pool = DecodePool(size=3, memory_budget=150 * 2**20)  # one at a time
    data, sizes = bomb(2300), []

    def decode() -> None:
        values, _ = pool.decode(data, "large", {}, DecodeLimits())
        sizes.append(values.shape)
        assert pool._reserved <= pool.memory_budget

    try:
        threads = [threading.Thread(target=decode) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert sizes == [(2300, 2300, 3)] * 5 and pool._reserved == 0
    finally:
        pool.close()


def test_a_forked_process_gets_its_own_pool() -> None:
    isolation.load_image(jpeg(64))
    code = (
        "import os, sys, numpy as np\n"
        "from babydoctor.imaging import isolation\n"
        "data = sys.stdin.buffer.read()\n"
        "first = isolation.load_image(data).tobytes()\n"
        "child = os.fork()\n"
        "same = isolation.load_image(data).tobytes() == first\n"
        "if child == 0: os._exit(0 if same else 3)\n"
        "sys.exit(0 if same and os.waitpid(child, 0)[1] == 0 else 4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=jpeg(64), capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_no_process_outlives_its_owner() -> None:
    code = (
        "import os, sys\n"
        "from babydoctor.imaging import isolation\n"
        "isolation.load_image(sys.stdin.buffer.read())\n"
        "print(isolation.shared_pool()._idle[0].pid, flush=True)\n"
        "os._exit(0)\n"  # like a crash, without cleanup
    )
    done = subprocess.run([sys.executable, "-c", code], input=jpeg(64), capture_output=True, check=True, timeout=120)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the decoding process is still there")


def test_secrets_do_not_reach_the_decoding_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BABYDOCTOR_API_KEYS", "a-key-that-nobody-may-see")
    pool = DecodePool(size=1)
    try:
        pool.decode(jpeg(64), "good", {}, SHORT)
        assert b"a-key-that" not in Path(f"/proc/{pool._idle[0].pid}/environ").read_bytes()
    finally:
        pool.close()


def test_a_jpeg_is_decoded_with_little_overhead() -> None:
    """Measures CPU time of both sides, which other load hardly changes. The target is 3 ms for 512 x 512.

    Measured in wall time under other load: 0.5 to 0.9 ms (medians of 1,500 pairs; see the guide of ``imaging``).
    """
    data, pool = jpeg(512), DecodePool(size=1)
    try:
        pool.decode(data, "warm", {}, DecodeLimits())
        before, owner = _cpu_seconds(pool._idle[0].pid), time.process_time()
        for _ in range(100):
            pool.decode(data, "jpeg", {}, DecodeLimits())
        spent = _cpu_seconds(pool._idle[0].pid) - before + time.process_time() - owner
        here = time.process_time()
        for _ in range(100):
            load_here(data)
        here = time.process_time() - here
        assert (spent - here) / 100 < 0.01, f"{10 * (spent - here):.2f} ms an image"
    finally:
        pool.close()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
