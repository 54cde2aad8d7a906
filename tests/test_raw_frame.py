"""Frames without a window: the canvas of the web UI shows the same as ``dicom.render``."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.image_files import dicom
from PIL import Image
from pydicom.examples import get_path

from babydoctor.imaging.dicom import raw_frame as module
from babydoctor.imaging.dicom import read_dicom, render
from babydoctor.imaging.dicom.raw_frame import color_block, raw_frame
from babydoctor.imaging.isolation import raw_frame as isolated_frame
from babydoctor.serve.page import html as show
from babydoctor.serve.page.scan import open_scan
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.arrangement import Arrangement
from babydoctor.serve.page.viewer.state import take_state, viewer_state

STATIC = Path(show.__file__).parent / "static"

PAINT = """
import {readFileSync, writeFileSync} from 'node:fs';
const [file, block, window, out] = process.argv.slice(2);
globalThis.fetch = async () => ({ok: true, arrayBuffer: async () => new Uint8Array(readFileSync(block)).buffer});
globalThis.document = {baseURI: 'http://127.0.0.1/'};
const {Frames, paint} = await import(file);
const canvas = {getContext: () => ({
  createImageData: (width, height) => ({data: new Uint8ClampedArray(4 * width * height)}),
  putImageData: (image) => writeFileSync(out, image.data),
})};
paint(await new Frames('key').get(0), JSON.parse(window), false, canvas);
"""


def header(block: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<I", block[:4])
    return dict(json.loads(block[4 : 4 + length]))


def painted(folder: Path, block: bytes, window: tuple[float, float] | None) -> np.ndarray:
    """What the web UI's JavaScript paints from a block, uint8 ``[rows, columns, 3]``."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    shutil.copy(STATIC / "viewer_frames.js", folder / "frames.mjs")
    (folder / "paint.mjs").write_text(PAINT)
    (folder / "block").write_bytes(block)
    shown = None if window is None else {"center": window[0], "width": window[1]}
    arguments = [str(folder / "frames.mjs"), str(folder / "block"), json.dumps(shown), str(folder / "out")]
    subprocess.run([node, str(folder / "paint.mjs"), *arguments], check=True, timeout=60)
    size = header(block)
    return np.fromfile(folder / "out", np.uint8).reshape(size["rows"], size["columns"], 4)[..., :3]


VALUES = np.arange(-40, 60, dtype=np.int16).reshape(10, 10)


@pytest.mark.parametrize(
    "data",
    [
        dicom(VALUES, RescaleSlope="0.5", RescaleIntercept="-3"),
        dicom(VALUES, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=-40),
        dicom(np.linspace(-3, 9, 100, dtype=np.float32).reshape(10, 10)),
    ],
    ids=["rescaled", "inverse with padding", "floats"],
)
@pytest.mark.parametrize("window", [None, (0, 400), (1.5, 1), (0.25, 0.5), (-7, 20.3), (10, 2)])
def test_the_browser_shows_the_same_gray_levels(tmp_path: Path, data: bytes, window: tuple[float, float] | None):
    image = read_dicom(data)
    center, width = window or (None, None)
    expected = np.asarray(render(image, 0, center, width, square_pixels=False))
    assert (painted(tmp_path, raw_frame(image, 0), window) == expected).all()


def test_a_supplemental_palette_has_the_same_colors(tmp_path: Path):
    table: dict[str, Any] = {"PixelPresentation": "COLOR", "BitsStored": 9, "HighBit": 8}
    for color, entries in (("Red", b"\xff\0"), ("Green", b"\0\xff"), ("Blue", b"\0\0")):
        table[f"{color}PaletteColorLookupTableDescriptor"] = ("US", [2, 256, 8])
        table[f"{color}PaletteColorLookupTableData"] = ("OW", entries)
    image = read_dicom(dicom(np.array([[0, 128, 256, 257]], np.uint16), **table))
    assert (painted(tmp_path, raw_frame(image, 0), (128, 256)) == np.asarray(render(image, 0, 128, 256))).all()


@pytest.mark.parametrize("name", ["ct", "mr", "rt_dose", "overlay", "rgb_color", "palette_color"])
def test_real_files_in_a_decoding_process(tmp_path: Path, name: str):
    image = read_dicom(get_path(name))
    block = isolated_frame(image, 0)
    assert (painted(tmp_path, block, None) == np.asarray(render(image, square_pixels=False))).all()
    assert not re.search(rb"Patient|\d\.\d+\.\d+\.\d+\.\d", block[: 4 + struct.unpack("<I", block[:4])[0]])


@pytest.mark.parametrize(
    ("attributes", "marks"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, ["R", "A", "L", "P"]),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, ["A", "H", "P", "F"]),
        ({"ImageOrientationPatient": [0.8, 0.6, 0, 0, 0, -1]}, ["RA", "H", "LP", "F"]),
        ({"PatientOrientation": ["L", "F"]}, ["R", "H", "L", "F"]),
        ({"PatientOrientation": ["Smith", "F"]}, None),
        ({}, None),
    ],
)
def test_orientation_letters(attributes: dict[str, Any], marks: list[str] | None):
    assert header(raw_frame(read_dicom(dicom(VALUES, **attributes)), 0))["marks"] == marks


def test_a_large_frame_is_subsampled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_BYTES", 3 * 100)
    size = header(color_block(np.zeros((40, 30, 3), np.uint8)))
    assert (size["step"], size["rows"], size["columns"]) == (4, 10, 8)


def test_a_region_is_cropped_from_the_shown_frame_and_rotates_with_it():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("RGB")
    part = Arrangement(is_inverted=True, is_mirrored=True, quarter_turns=1, region=(1, 0, 4, 2)).apply(picture, 4, 3)
    # [[1 2 3] [5 6 7]] mirrored is [[3 2 1] [7 6 5]]; turned clockwise, its columns read from below are the rows.
    assert (255 - np.asarray(part)[..., 0]).tolist() == [[7, 3], [6, 2], [5, 1]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"frame": 1},
        {"frame": True},
        {"quarter_turns": 4},
        {"is_inverted": 1},
        {"preset": "lungs"},
        {"center": 3},
        {"center": float("nan"), "width": 5},
        {"center": 3, "width": 5, "preset": "lung"},
        {"region": [0, 0, 999, 20]},
        {"region": [0, 0, 4, 20]},
        {"region": [0.0, 0, 20, 20]},
    ],
    ids=str,
)
def test_an_invalid_state_changes_nothing(wrong: dict[str, Any]):
    scan = open_scan(Path(get_path("ct")).read_bytes())
    view = scan.view()
    before = viewer_state(scan, view)
    take_state(scan, before | {"region": [0, 0, 20, 20]})
    shown = viewer_state(scan, view)
    with pytest.raises(PageError):
        take_state(scan, before | {"preset": None} | wrong | {"change": 7})
    assert viewer_state(scan, view) == shown | {"change": 7}
