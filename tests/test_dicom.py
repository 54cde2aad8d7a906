"""DICOM: real files of pydicom, and generated files for what those lack."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from helpers.image_files import dicom
from pydicom import examples
from pydicom.data import get_testdata_file
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless

from babydoctor.imaging.dicom import IDENTIFYING_TAGS, harmless_facts, identifying_tags, read_dicom, render
from babydoctor.imaging.dicom.safety import codestream_size
from babydoctor.imaging.load import load_image
from babydoctor.imaging.windows import CT_PRESETS
from babydoctor.schema import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR")


def path_of(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def gray(data: bytes, **options: Any) -> list[int]:
    return np.asarray(render(read_dicom(data), **options))[..., 0].ravel().tolist()


def test_a_real_ct_is_shown_in_hounsfield_units() -> None:
    ct = read_dicom(examples.get_path("ct"))
    assert (ct.modality, ct.num_frames, ct.windows) == ("CT", 1, ())
    assert ct.pixel_spacing == pytest.approx((0.661468, 0.661468))
    hounsfield = pydicom.dcmread(examples.get_path("ct")).pixel_array.astype(float) - 1024
    shown = np.asarray(render(ct, preset="soft-tissue"))[..., 0].astype(float)
    expected = np.clip((hounsfield - 39.5) / 399 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(shown, expected, atol=0.51)
    assert render(ct, preset="soft-tissue").tobytes() == render(ct, center=40, width=400).tobytes()
    assert len({render(ct, preset=name).tobytes() for name in CT_PRESETS}) == 5


def test_without_a_window_one_is_computed_from_the_frame_and_reported() -> None:
    image = render(read_dicom(examples.get_path("ct")))
    assert (
        image.info["window"] == "center -38, width 1646 (percentiles 0.5 to 99.5 of the frame; the file has no window)"
    )
    mostly = np.zeros((20, 20), np.int16)
    mostly[0, 0] = 50
    data = dicom(mostly)
    assert "minimum to maximum" in render(read_dicom(data)).info["window"]
    assert sorted(set(gray(data))) == [0, 255]
    assert set(gray(dicom(np.full((4, 4), 9, np.int16)))) == {128}
    eight = np.arange(0, 100, dtype=np.uint8).reshape(10, 10)
    assert gray(dicom(eight)) == list(range(100)) and "as stored" in render(read_dicom(dicom(eight))).info["window"]


def test_a_real_mr_has_two_windows_and_shows_the_first() -> None:
    mr = read_dicom(path_of("examples_overlay.dcm"))
    assert [(w.center, w.width, w.explanation) for w in mr.windows] == [(450, 790, "WINDOW1"), (200, 443, "WINDOW2")]
    first = render(mr)
    assert "WINDOW1" in first.info["window"] and first.size == (484, 300)
    second = render(mr, center=mr.windows[1].center, width=mr.windows[1].width)
    assert np.asarray(second).mean() > np.asarray(first).mean() + 5


def test_the_colors_of_real_ultrasound_agree_across_encodings() -> None:
    plain = np.asarray(load_image(examples.get_path("rgb_color"))).astype(int)
    jpeg2000 = render(read_dicom(examples.get_path("jpeg2k"))).resize((320, 240))
    assert np.abs(plain - np.asarray(jpeg2000).astype(int)).mean() < 12  # the same picture, stored at twice the size
    loop = read_dicom(examples.get_path("ybr_color"))
    frames = [np.asarray(render(loop, frame=frame)) for frame in (0, 15, 29)]
    assert loop.num_frames == 30 and frames[0].shape == (240, 320, 3)
    assert (frames[0] != frames[1]).any() and (frames[1] != frames[2]).any()
    palette = np.asarray(load_image(examples.get_path("palette_color")))
    assert palette.shape == (350, 800, 3) and palette[10, 200, 2] > palette[10, 200, 0]  # the manufacturer's blue bar
    ybr = np.asarray(load_image(path_of("SC_ybr_full_422_uncompressed.dcm")))
    assert ybr[5, 5].tolist()[0] > 240 and ybr[5, 5].max() > ybr[5, 5].min() + 200  # a red stripe on top


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless"])
def test_lossless_encodings_of_one_real_mr_look_the_same(name: str) -> None:
    assert load_image(path_of(f"{name}.dcm")).tobytes() == load_image(path_of("MR_small.dcm")).tobytes()


def test_jpeg_ls_needs_no_other_package() -> None:
    assert (
        load_image(path_of("MR_small_jpeg_ls_lossless.dcm")).tobytes() == load_image(path_of("MR_small.dcm")).tobytes()
    )


def test_windows_follow_the_standard() -> None:
    values = np.array([[-100, 0, 1, 2, 3, 4, 100]], np.int16)
    # PS3.3 C.11.2.1.2.1: with center 2 and width 5, x <= -0.5 is black and x > 3.5 is white.
    shown = gray(dicom(values, WindowCenter="2", WindowWidth="5"))
    assert shown == [0, 32, 96, 159, 223, 255, 255]
    exact = gray(dicom(values, WindowCenter="2", WindowWidth="4", VOILUTFunction="LINEAR_EXACT"))
    assert exact == [0, 0, 64, 128, 191, 255, 255]
    sigmoid = gray(dicom(values, WindowCenter="2", WindowWidth="4", VOILUTFunction="SIGMOID"))
    assert sigmoid[3] == 128 and sigmoid[1] == round(255 / (1 + np.exp(2))) and sigmoid[0] == 0
    assert gray(dicom(values, WindowCenter="2", WindowWidth="1")) == [0, 0, 0, 255, 255, 255, 255]
    useless = read_dicom(dicom(values, WindowCenter=["2", "2"], WindowWidth=["0", "4"]))
    assert [(w.width, w.explanation) for w in useless.windows] == [(4, "window 2 of 2 in the file")]


def test_the_modality_lut_comes_before_the_window() -> None:
    values = np.array([[0, 10, 20]], np.int16)
    assert gray(dicom(values, RescaleSlope="2", RescaleIntercept="-20", WindowCenter="0.5", WindowWidth="41")) == [
        0,
        128,
        255,
    ]
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [3, 0, 16], "US"
    lut.add_new("LUTData", "US", [0, 1000, 500])
    table = dicom(
        np.array([[0, 1, 2]], np.uint16), ModalityLUTSequence=Sequence([lut]), WindowCenter="500.5", WindowWidth="1001"
    )
    assert gray(table) == [0, 255, 128]


def test_a_voi_lut_is_used_without_a_window() -> None:
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTExplanation = [4, 0, 8], "CONTRAST"
    lut.add_new("LUTData", "US", [255, 0, 51, 102])
    data = dicom(np.array([[0, 1, 2, 3]], np.uint16), VOILUTSequence=Sequence([lut]))
    assert gray(data) == [255, 0, 51, 102]
    assert render(read_dicom(data)).info["window"] == "VOI LUT CONTRAST"


def test_monochrome1_is_inverted_and_padding_stays_black() -> None:
    values = np.array([[-2000, 0, 100, 200]], np.int16)
    window = {"WindowCenter": "100.5", "WindowWidth": "201", "PhotometricInterpretation": "MONOCHROME1"}
    assert gray(dicom(values, **window)) == [255, 255, 128, 0]
    assert gray(dicom(values, PixelPaddingValue=-2000, **window)) == [0, 255, 128, 0]
    # Padding is also ignored when the window is computed from the frame.
    spread = np.array([[-2000] * 8 + [0, 100]], np.int16)
    assert gray(dicom(spread, PixelPaddingValue=-2000))[8:] == [0, 255]


def test_float_and_signed_pixels() -> None:
    assert gray(dicom(np.array([[-0.5, 0.0, np.nan, 0.5]], np.float32)), center=0, width=1)[0] == 0
    floats = gray(dicom(np.array([[-0.5, 0.0, 0.5]], np.float32)))
    assert floats == [0, 128, 255]
    assert gray(dicom(np.array([[-100, 0, 100]], np.int8))) == [0, 128, 255]


def test_frames_of_enhanced_objects_have_their_own_windows() -> None:
    def group(center: str, slope: str) -> Dataset:
        item, voi, transform, measures = Dataset(), Dataset(), Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, "3"
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = slope, "0", "US"
        measures.PixelSpacing = ["0.5", "0.5"]
        item.FrameVOILUTSequence = Sequence([voi])
        item.PixelValueTransformationSequence = Sequence([transform])
        item.PixelMeasuresSequence = Sequence([measures])
        return item

    pixels = np.array([[1, 2], [1, 2]], np.uint16)
    frames = Sequence([group("1.5", "1"), group("20.5", "10")])
    data = dicom(pixels, NumberOfFrames=2, Rows=1, PerFrameFunctionalGroupsSequence=frames)
    image = read_dicom(data)
    assert image.num_frames == 2 and image.pixel_spacing == (0.5, 0.5) and image.windows[0].center == 1.5
    assert gray(data, frame=0) == [128, 255] and gray(data, frame=1) == [0, 128]


def test_pixels_that_are_not_square_are_stretched() -> None:
    assert render(read_dicom(dicom(np.zeros((10, 20), np.int16), PixelSpacing=["3", "1"]))).size == (20, 30)
    assert render(read_dicom(dicom(np.zeros((10, 20), np.int16), PixelAspectRatio=[1, 2]))).size == (40, 10)
    assert render(read_dicom(dicom(np.zeros((10, 20), np.int16), PixelSpacing=["0.5", "0.5"]))).size == (20, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "foot"}, "'foot': must be one of soft-tissue"),
        ({"preset": "lung", "center": 1.0, "width": 2.0}, "not both"),
        ({"center": 1.0}, "both or neither"),
        ({"center": 1.0, "width": 0.0}, "at least 1"),
        ({"center": float("nan"), "width": 5.0}, "at least 1"),
        ({"frame": 1}, "frames 0 to 0"),
        ({"frame": -1}, "frame -1 does not exist"),
    ],
)
def test_an_invalid_frame_window_or_preset_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(read_dicom(examples.get_path("ct")), **options)


def test_windows_are_for_gray_images_and_presets_for_ct() -> None:
    with pytest.raises(UserError, match="for CT, this is MR"):
        render(read_dicom(examples.get_path("mr")), preset="lung")
    with pytest.raises(UserError, match="color image"):
        render(read_dicom(examples.get_path("rgb_color")), center=1, width=2)


@pytest.mark.parametrize("name", ["rt_plan", "rt_ss", "waveform", "dicomdir"])
def test_real_objects_without_an_image_are_named(name: str) -> None:
    with pytest.raises(UserError, match="holds no image"):
        load_image(examples.get_path(name).read_bytes())


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "badVR.dcm", "meta_missing_tsyntax.dcm"])
def test_real_damaged_files_are_user_errors(name: str) -> None:
    with pytest.raises(UserError, match=name):
        load_image(path_of(name))


def test_every_truncation_of_a_real_file_is_a_user_error() -> None:
    data = examples.get_path("mr").read_bytes()
    for length in range(132, len(data) - 200, 431):  # the file ends with padding, which may be missing
        with pytest.raises(UserError):
            load_image(data[:length])


@pytest.mark.filterwarnings("ignore")  # pydicom warns about invalid tags and lengths
@pytest.mark.parametrize("name", ["CT_small", "examples_palette", "examples_ybr_color", "MR_small_RLE", "rtdose"])
def test_flipped_bytes_are_user_errors_or_pictures(name: str) -> None:
    data = path_of(f"{name}.dcm").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(132, min(len(data), 3000), rng.choice([1, 8])):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(UserError):
            image = read_dicom(bytes(damaged), max_pixels=4_000_000)
            assert render(image).mode == "RGB"
            harmless_facts(image)
            identifying_tags(image)


def test_sizes_are_checked_before_decoding() -> None:
    with pytest.raises(UserError, match="16,384 pixels; the limit is 10,000"):
        load_image(examples.get_path("ct"), max_pixels=10_000)
    with pytest.raises(UserError, match="no size"):
        load_image(dicom(np.zeros((2, 2), np.int16), Rows=0))


def test_a_codestream_larger_than_its_header_is_refused() -> None:
    path = examples.get_path("jpeg2k")
    dataset = pydicom.dcmread(path)
    assert dataset.file_meta.TransferSyntaxUID == JPEG2000Lossless
    dataset.Rows, dataset.Columns = 48, 64
    file = io.BytesIO()
    dataset.save_as(file)
    with pytest.raises(UserError, match="640 x 480 inside, the DICOM header says 64 x 48"):
        load_image(file.getvalue())


def test_codestream_sizes_of_all_formats_are_read() -> None:
    from pydicom.encaps import get_frame

    for name in (
        "examples_jpeg2k",
        "examples_ybr_color",
        "MR_small_jpeg_ls_lossless",
        "SC_rgb_jpeg_gdcm",
        "JPGExtended",
    ):
        dataset = pydicom.dcmread(path_of(f"{name}.dcm"))
        frame = get_frame(dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
        assert codestream_size(frame) == (dataset.Columns, dataset.Rows), name
    assert codestream_size(b"") is None and codestream_size(b"\xff\xd8\xff") is None


def test_a_deflated_bomb_is_refused() -> None:
    real = path_of("image_dfl.dcm").read_bytes()
    assert load_image(real).size == (512, 512)
    start = 144 + int.from_bytes(real[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(20)) + packer.flush()
    with pytest.raises(UserError, match="inflates to more than"):
        load_image(real[:start] + bomb, max_pixels=1_000_000)


def test_every_identifying_tag_is_a_real_keyword() -> None:
    assert [keyword for keyword in IDENTIFYING_TAGS if tag_for_keyword(keyword) is None] == []
    assert len(set(IDENTIFYING_TAGS)) == len(IDENTIFYING_TAGS)
    for keyword in (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "AccessionNumber",
        "InstitutionName",
        "StudyInstanceUID",
    ):
        assert keyword in IDENTIFYING_TAGS


def test_facts_describe_the_picture_and_never_the_person() -> None:
    data = dicom(
        np.zeros((4, 6), np.int16),
        PatientName="Doe^Jane",
        PatientID="4711",
        StudyDescription="Jane's knee",
        BodyPartExamined="KNEE",
        ViewPosition="ask Dr. Roe",
        SliceThickness="2.5",
        WindowCenter="40",
        WindowWidth="400",
        PixelSpacing=["1", "1"],
    )
    image = read_dicom(data)
    facts = harmless_facts(image)
    assert facts == {
        "modality": "CT",
        "rows": 4,
        "columns": 6,
        "num_frames": 1,
        "photometric": "MONOCHROME2",
        "body_part": "KNEE",
        "pixel_spacing_mm": (1.0, 1.0),
        "slice_thickness_mm": 2.5,
        "windows": [(40.0, 400.0)],
    }
    assert {"PatientName", "PatientID", "StudyDescription", "SOPInstanceUID"} <= set(identifying_tags(image))
    assert "Doe" not in repr(image) and "Doe" not in str(facts)
    for name in ("ct", "mr", "jpeg2k", "palette_color", "ybr_color"):
        real = read_dicom(examples.get_path(name))
        text = str(harmless_facts(real))
        for keyword in identifying_tags(real):
            value = str(real.dataset.get(keyword) or "")
            assert len(value) < 4 or value not in text, (name, keyword)


def test_invalid_values_are_not_quoted_in_warnings(recwarn: pytest.WarningsRecorder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dicom(
            np.zeros((4, 6), np.int16), PatientBirthDate="Jane's", BodyPartExamined="jane@home", PatientAge="Jane"
        )
    image = read_dicom(data)
    render(image)
    assert "body_part" not in harmless_facts(image) and "PatientAge" in identifying_tags(image)
    assert [str(warning.message) for warning in recwarn if "ane" in str(warning.message)] == []


def test_the_module_is_free_of_torch() -> None:
    code = "import sys, babydoctor.imaging.dicom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
