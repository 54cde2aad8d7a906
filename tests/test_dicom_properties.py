"""Random small DICOM files, compared with a second implementation that shares no code with the package."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from helpers.image_files import BIG_ENDIAN, IMPLICIT, LITTLE_ENDIAN, dicom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babydoctor.imaging.dicom import read_dicom, render


def reference_gray(cell: int, file: dict[str, Any]) -> float:
    """One cell of a gray image -> level 0 to 255, in plain Python (PS3.5 8.1.1, PS3.3 C.11)."""
    value = (cell >> (file["high_bit"] + 1 - file["stored"])) % 2 ** file["stored"]
    if file["signed"] and value >= 2 ** (file["stored"] - 1):
        value -= 2 ** file["stored"]
    if file["padding"] is not None and value == file["padding"]:
        return 0
    x = value * file["slope"] + file["intercept"]
    center, width = file["center"], file["width"]
    if file["function"] == "SIGMOID":
        unit = 1 / (1 + math.exp(min(700, -4 * (x - center) / width)))
    elif file["function"] == "LINEAR_EXACT" or width < 1:
        unit = (x - center) / width + 0.5
    elif width == 1:
        unit = 1.0 if x > center - 0.5 else 0.0
    else:
        unit = (x - (center - 0.5)) / (width - 1) + 0.5
    unit = min(1.0, max(0.0, unit))
    return 255 * (1 - unit if file["photometric"] == "MONOCHROME1" or file["shape"] == "INVERSE" else unit)


def reference_color(cells: list[int], photometric: str) -> list[float]:
    """Three 8-bit samples -> RGB (PS3.3 C.7.6.3.1.2)."""
    if photometric == "RGB":
        return [float(cell) for cell in cells]
    y, blue, red = cells[0], cells[1] - 128, cells[2] - 128
    rgb = (y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue)
    return [min(255.0, max(0.0, value)) for value in rgb]


decimals = st.floats(-2000, 2000).map(lambda value: float(f"{value:.6g}"))


@st.composite
def gray_files(draw: st.DrawFn) -> tuple[dict[str, Any], np.ndarray, str]:
    allocated = draw(st.sampled_from([8, 16]))
    stored = draw(st.integers(1, allocated))
    file = {
        "stored": stored,
        "high_bit": draw(st.integers(stored - 1, allocated - 1)),
        "signed": draw(st.booleans()) and stored > 1,
        "slope": draw(st.one_of(st.just(1.0), st.floats(0.001, 20).map(lambda value: float(f"{value:.6g}")))),
        "intercept": draw(st.one_of(st.just(0.0), decimals)),
        "center": draw(decimals),
        "width": draw(st.floats(0.01, 5000).map(lambda value: float(f"{value:.6g}"))),
        "function": draw(st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"])),
        "photometric": draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"])),
        "shape": draw(st.sampled_from([None, "IDENTITY", "INVERSE"])),
        "padding": None,
    }
    if file["high_bit"] == stored - 1 and draw(st.booleans()):
        low = -(2 ** (stored - 1)) if file["signed"] else 0
        file["padding"] = draw(st.integers(low, low + 2**stored - 1))
    frames, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    count = frames * rows * columns
    cells = draw(st.lists(st.integers(0, 2**allocated - 1), min_size=count, max_size=count))
    array = np.array(cells, f"u{allocated // 8}").reshape(frames * rows, columns)
    return file | {"frames": frames}, array, draw(st.sampled_from([IMPLICIT, LITTLE_ENDIAN, BIG_ENDIAN]))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(gray_files())
def test_gray_frames_equal_the_reference(made: tuple[dict[str, Any], np.ndarray, str]) -> None:
    file, cells, syntax = made
    rows = cells.shape[0] // file["frames"]
    attributes: dict[str, Any] = {
        "Rows": rows,
        "NumberOfFrames": str(file["frames"]),
        "BitsStored": file["stored"],
        "HighBit": file["high_bit"],
        "PixelRepresentation": int(file["signed"]),
        "PhotometricInterpretation": file["photometric"],
        "RescaleSlope": f"{file['slope']:.6g}",
        "RescaleIntercept": f"{file['intercept']:.6g}",
        "WindowCenter": f"{file['center']:.6g}",
        "WindowWidth": f"{file['width']:.6g}",
        "VOILUTFunction": file["function"],
    }
    if file["shape"]:
        attributes["PresentationLUTShape"] = file["shape"]
    if file["padding"] is not None:
        attributes["PixelPaddingValue"] = ("SS" if file["signed"] else "US", file["padding"])
    scan = read_dicom(dicom(cells, syntax, **attributes))
    assert scan.num_frames == file["frames"]
    for frame in range(file["frames"]):
        shown = np.asarray(render(scan, frame))[..., 0]
        expected = [[reference_gray(int(cell), file) for cell in row] for row in cells[frame * rows :][:rows]]
        _assert_close(shown, np.array(expected), cells[frame * rows :][:rows], file)


def _assert_close(shown: np.ndarray, expected: np.ndarray, cells: np.ndarray, file: dict[str, Any]) -> None:
    """Equal up to rounding, except for values at the step of a window of width 1."""
    wrong = np.abs(shown.astype(float) - expected) > 0.51
    assert not wrong.any(), (shown, expected, cells, file)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(0, 255), min_size=24, max_size=24),
    st.sampled_from(["RGB", "YBR_FULL"]),
    st.booleans(),
    st.sampled_from([IMPLICIT, LITTLE_ENDIAN, BIG_ENDIAN]),
)
def test_color_frames_equal_the_reference(cells: list[int], photometric: str, planar: bool, syntax: str) -> None:
    array = np.array(cells, np.uint8).reshape(2, 4, 3)
    stored = np.moveaxis(array, -1, 0).tobytes() if planar else array.tobytes()
    attributes: dict[str, Any] = {"PhotometricInterpretation": photometric, "PlanarConfiguration": int(planar)}
    attributes["PixelData"] = ("OB", stored)
    shown = np.asarray(render(read_dicom(dicom(array, syntax, **attributes)))).astype(float)
    expected = np.array([[reference_color(pixel.tolist(), photometric) for pixel in row] for row in array])
    assert np.abs(shown - expected).max() <= 1


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 3))
def test_frames_of_one_bit_are_packed_without_gaps(bits: list[bool], frames: int) -> None:
    every = np.array(bits * frames, np.uint8)
    packed = np.packbits(every, bitorder="little").tobytes()
    array = np.zeros((1, len(bits)), np.uint8)
    attributes = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "NumberOfFrames": str(frames)}
    padded = packed + b"\0" * (len(packed) % 2)
    scan = read_dicom(dicom(array, **attributes, PixelData=("OB", padded)))
    for frame in range(frames):
        assert np.asarray(render(scan, frame))[0, :, 0].tolist() == [255 * bit for bit in bits]
