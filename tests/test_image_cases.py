"""Real-world files, reduced to a few pixels: each gives the right picture, a warning, or an error with the cause.

Each test covers one kind of fault with its variants. Expected gray levels are those of the first row.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.image_files import (
    BIG_ENDIAN,
    IMPLICIT,
    LITTLE_ENDIAN,
    dicom,
    dicom_bytes,
    dicom_dataset,
    encapsulated,
    item,
    png,
    png_chunk,
    tiff,
)
from PIL import Image

from babydoctor.imaging.dicom import is_dicom, read_dicom, render
from babydoctor.imaging.limits import ImageError
from babydoctor.imaging.load import load_image

Row = list[int] | list[list[int]]

STEPS = np.array([[0, 100, 200, 300]], np.int16)
STEPS_WINDOW = {"WindowCenter": "150.5", "WindowWidth": "301"}
STEPS_SHOWN = [0, 85, 170, 255]


def first_row(data: bytes, **options: Any) -> Row:
    """The first row of the picture: levels where it is gray, else colors."""
    image = render(read_dicom(data), **options) if options else load_image(data)
    row = np.asarray(image)[0]  # [w, 3]
    return row[:, 0].tolist() if (row == row[:, :1]).all() else row.tolist()


def warnings_of(data: bytes) -> str:
    return " | ".join(load_image(data).info.get("warnings", ()))


# DICOM: finding the data set


@pytest.mark.parametrize("syntax", [IMPLICIT, LITTLE_ENDIAN, BIG_ENDIAN])
def test_a_data_set_without_file_meta_is_read(syntax: str) -> None:
    bare = dicom_bytes(dicom_dataset(STEPS, **STEPS_WINDOW), syntax, has_meta=False)
    for data in (bare, bytes(128) + bare, b"DICM" + bare):
        assert is_dicom(data) and first_row(data) == STEPS_SHOWN
        assert "transfer syntax is missing" in warnings_of(data)


def test_file_meta_without_a_transfer_syntax_is_read() -> None:
    data = dicom(STEPS, **STEPS_WINDOW)
    start = data.index(b"\x02\x00\x10\x00UI")
    end = start + 8 + int.from_bytes(data[start + 6 : start + 8], "little")
    length = int.from_bytes(data[140:144], "little") - (end - start)
    cut = data[:140] + struct.pack("<I", length) + data[144:start] + data[end:]
    assert first_row(cut) == STEPS_SHOWN and "transfer syntax is missing" in warnings_of(cut)


@pytest.mark.parametrize("name", ["scan.dcm", "scan", "scan.png", "scan.txt"])
def test_reading_from_a_path_equals_reading_from_bytes(name: str, tmp_path: Path) -> None:
    whole = dicom(STEPS, **STEPS_WINDOW)
    for data in (whole, whole[132:], dicom_bytes(dicom_dataset(STEPS, **STEPS_WINDOW), IMPLICIT, has_meta=False)):
        (tmp_path / name).write_bytes(data)
        assert load_image(tmp_path / name).tobytes() == load_image(data).tobytes()
        assert first_row(data) == STEPS_SHOWN
    (tmp_path / name).write_bytes(b"plain words")
    with pytest.raises(ImageError, match="not a PNG"):
        load_image(tmp_path / name)


def jpeg_frame(color: tuple[int, int, int] = (200, 40, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(file, "JPEG", quality=95)
    return file.getvalue()


JPEG = {"Rows": 16, "Columns": 16, "SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422"}
JPEG |= {"PlanarConfiguration": 0}
BASELINE = "1.2.840.10008.1.2.4.50"


def test_a_whole_frame_without_its_sequence_delimiter_is_shown() -> None:
    data = encapsulated([jpeg_frame()], BASELINE, has_delimiter=False, **JPEG)
    expected = encapsulated([jpeg_frame()], BASELINE, **JPEG)
    assert load_image(data).tobytes() == load_image(expected).tobytes()
    assert "delimiter after the pixel data is missing" in warnings_of(data) and warnings_of(expected) == ""
    for length in (1, 5, 100):
        with pytest.raises(ImageError, match="cut off"):
            load_image(data[:-length])


def test_the_codestream_gives_the_compression_if_the_header_does_not() -> None:
    data = encapsulated([jpeg_frame()], BASELINE, **JPEG)
    expected = load_image(data).tobytes()
    start = data.index(b"\x08\x00\x16\x00UI")
    assert load_image(data[start:]).tobytes() == expected  # no file meta
    wrong = data.replace(BASELINE.encode() + b"\0" * (len(BASELINE) % 2), LITTLE_ENDIAN.encode().ljust(22, b"\0"))
    assert load_image(wrong).tobytes() == expected and "says Explicit VR Little Endian" in warnings_of(wrong)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.102", "MPEG-4 AVC/H.264"),
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile"),
        ("1.2.840.10008.1.2.4.107", "HEVC/H.265"),
        ("1.2.840.10008.1.2.4.94", "JPIP"),
        ("1.2.840.113619.5.2", "1.2.840.113619.5.2"),
        ("1.2.3.4.5", "1.2.3.4.5"),
    ],
)
def test_compressions_that_cannot_be_read_are_named(syntax: str, name: str) -> None:
    with pytest.raises(ImageError, match=name) as caught:
        load_image(encapsulated([b"\0" * 16], syntax, **JPEG))
    assert caught.value.code == "dicom_unsupported"


# DICOM: how pixels are stored


@pytest.mark.parametrize("syntax", [LITTLE_ENDIAN, BIG_ENDIAN])
def test_bits_end_at_the_high_bit(syntax: str) -> None:
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}
    left = np.array([[0, 0x1000, 0x8000, 0xFFF0]], np.uint16)
    assert first_row(dicom(left, syntax, BitsStored=12, HighBit=15, **window)) == [0, 16, 128, 255]
    middle = np.array([[0, 0x0400 | 3, 0x2000, 0x3FFC | 0xC000]], np.uint16)  # bits of other data above and below
    assert first_row(dicom(middle, syntax, BitsStored=12, HighBit=13, **window)) == [0, 16, 128, 255]
    signed = np.array([[0x800, 0xFFF, 0, 0x7FF]], np.uint16)
    shown = first_row(
        dicom(signed, syntax, BitsStored=12, HighBit=11, PixelRepresentation=1, WindowCenter="0", WindowWidth="4096")
    )
    assert shown == [0, 127, 128, 255]


def test_bits_above_the_high_bit_are_ignored_with_a_warning() -> None:
    values = np.array([[0, 85, 170, 255]], np.uint16)
    clean = dicom(values, BitsStored=8, HighBit=7)
    marked = dicom(values | 0x3000, BitsStored=8, HighBit=7)
    assert first_row(clean) == first_row(marked) == STEPS_SHOWN
    assert warnings_of(clean) == "" and "above bit 7" in warnings_of(marked)


@pytest.mark.parametrize("stated", ["HSV", "ARGB", "CMYK", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "XYB", "nonsense"])
def test_unsupported_color_spaces_are_named(stated: str) -> None:
    with pytest.raises(ImageError, match=stated) as caught:
        load_image(dicom(np.zeros((1, 2, 3), np.uint8), PhotometricInterpretation=stated))
    assert caught.value.code == "dicom_unsupported"


EIGHT = np.array([[0, 80, 160, 240]], np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SamplesPerPixel": None}, "SamplesPerPixel"),
        ({"PhotometricInterpretation": "monochrome2"}, "'monochrome2'"),
        ({"PhotometricInterpretation": "MONOCHROME 2"}, "'MONOCHROME 2'"),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation"),
        ({"BitsAllocated": None}, "BitsAllocated"),
        ({"BitsStored": None}, "BitsStored"),
        ({"HighBit": None}, "HighBit"),
        ({"HighBit": 11}, "HighBit"),
        ({"PixelRepresentation": None}, "PixelRepresentation"),
        ({"NumberOfFrames": "3"}, "the header says 3 frames, the file holds 1"),
        ({"NumberOfFrames": "0"}, "NumberOfFrames is 0"),
    ],
)
def test_a_missing_element_with_one_meaning_is_filled_in_with_a_warning(change: dict[str, Any], message: str) -> None:
    data = dicom(EIGHT, **change)
    assert first_row(data) == [0, 80, 160, 240] and message in warnings_of(data)


def test_a_missing_element_with_two_meanings_is_refused() -> None:
    with pytest.raises(ImageError, match="low values may be dark or bright"):
        load_image(dicom(EIGHT, PhotometricInterpretation=None, Modality="CR"))
    assert first_row(dicom(EIGHT, PhotometricInterpretation=None, Modality="CR", PresentationLUTShape="IDENTITY"))
    with pytest.raises(ImageError, match="colors are unknown"):
        load_image(dicom(np.zeros((1, 2, 3), np.uint8), PhotometricInterpretation=None))
    assert first_row(dicom(STEPS, PixelRepresentation=None, **STEPS_WINDOW)) == STEPS_SHOWN
    with pytest.raises(ImageError, match="differ when read as signed"):
        load_image(dicom(-STEPS, PixelRepresentation=None))
    with pytest.raises(ImageError, match="3 samples per pixel contradicts"):
        load_image(dicom(np.zeros((1, 2, 3), np.uint8), PhotometricInterpretation="MONOCHROME2"))


def test_missing_color_layout_and_full_resolution_ybr() -> None:
    color = np.array([[[10, 20, 30], [200, 100, 0]]], np.uint8)
    data = dicom(color, PlanarConfiguration=None)
    assert first_row(data) == color[0].tolist() and "PlanarConfiguration" in warnings_of(data)
    ybr = dicom(color, PhotometricInterpretation="YBR_FULL")
    stated = dicom(color, PhotometricInterpretation="YBR_FULL_422")
    assert first_row(ybr) == first_row(stated) and "full resolution" in warnings_of(stated)


def test_implausible_pixel_spacing_is_ignored_with_a_warning() -> None:
    pixels = np.zeros((64, 64), np.uint8)
    for spacing in (["0.1", "10"], ["1e-9", "1"], ["1", "1e9"]):
        data = dicom(pixels, PixelSpacing=spacing)
        assert load_image(data).size == (64, 64) and "shown square" in warnings_of(data)
    for useless in (["0", "1"], ["-1", "1"]):
        assert load_image(dicom(pixels, PixelSpacing=useless)).size == (64, 64)
    assert load_image(dicom(pixels, PixelSpacing=["5", "0.5"])).size == (64, 640)


# DICOM: values


@pytest.mark.parametrize("syntax", [IMPLICIT, LITTLE_ENDIAN, BIG_ENDIAN])
def test_padding_is_read_with_the_type_of_the_pixels(syntax: str) -> None:
    values = np.array([[-2000] * 12 + [0, 100, 200, 300]], np.int16)
    for kind, padding in (("US", 63536), ("SS", -2000)):
        if syntax == IMPLICIT and kind == "US":
            continue  # the file does not say so
        assert first_row(dicom(values, syntax, PixelPaddingValue=(kind, padding)))[12:] == STEPS_SHOWN
    unsigned = np.array([[65535] * 12 + [0, 100, 200, 300]], np.uint16)
    assert first_row(dicom(unsigned, LITTLE_ENDIAN, PixelPaddingValue=("SS", -1)))[12:] == STEPS_SHOWN
    # A padding value that needs more bits than are stored.
    wide = np.array([[0x8000] * 12 + [0, 100, 200, 300]], np.uint16)
    attributes = {"BitsStored": 12, "HighBit": 11, "PixelPaddingValue": ("US", 0x8000)}
    assert first_row(dicom(wide, LITTLE_ENDIAN, **attributes))[12:] == STEPS_SHOWN


def test_float_padding() -> None:
    values = np.array([[-1e9, 0, 1, 2]], np.float32)
    assert first_row(dicom(values, FloatPixelPaddingValue=-1e9)) == [0, 0, 128, 255]
    ranged = np.array([[-1e9, -5e8, 0, 2]], np.float32)
    padding = {"FloatPixelPaddingValue": -1e9, "FloatPixelPaddingRangeLimit": -1e8}
    assert first_row(dicom(ranged, **padding)) == [0, 0, 0, 255]


def test_a_voi_lut_takes_negative_and_fractional_values() -> None:
    lut = item(LUTDescriptor=("US", [2, 0, 8]), LUTData=("OW", bytes([10, 60])))
    values = np.array([[0, 1, 2, 3]], np.uint16)
    assert first_row(dicom(values, RescaleIntercept="-2", RescaleSlope="1", VOILUTSequence=[lut])) == [10, 10, 10, 60]
    halves = dicom(values, RescaleIntercept="0", RescaleSlope="0.5", VOILUTSequence=[lut])
    assert first_row(halves) == [10, 10, 60, 60]
    tenths = dicom(
        np.array([[0, 10, 20, 30]], np.uint16), RescaleSlope="0.1", RescaleIntercept="0", VOILUTSequence=[lut]
    )
    assert first_row(tenths) == [10, 60, 60, 60]
    below = item(LUTDescriptor=("US", [2, 65535, 8]), LUTData=("OW", bytes([10, 60])))  # the first input value is -1
    shown = first_row(dicom(values, RescaleIntercept="-2", RescaleSlope="1", VOILUTSequence=[below]))
    assert shown == [10, 10, 60, 60]


@pytest.mark.parametrize("syntax", [LITTLE_ENDIAN, BIG_ENDIAN])
def test_lookup_tables_follow_the_file_byte_order(syntax: str) -> None:
    order = ">u2" if syntax == BIG_ENDIAN else "<u2"
    data = np.array([0, 1000, 500], order).tobytes()
    lut = item(LUTDescriptor=("US", [3, 0, 16]), ModalityLUTType="US", LUTData=("OW", data))
    values = np.array([[0, 1, 2]], np.uint16)
    window = {"WindowCenter": "500.5", "WindowWidth": "1001"}
    assert first_row(dicom(values, syntax, ModalityLUTSequence=[lut], **window)) == [0, 255, 128]


COLORS = [[0, 5, 9], [255, 20, 8], [10, 30, 7], [100, 200, 6]]


def palette(bits: int, data: Any, count: int = 4, first: int = 0) -> dict[str, Any]:
    """Palette attributes; ``data`` makes an element's value from its entries."""
    found: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for channel, color in enumerate(("Red", "Green", "Blue")):
        found[f"{color}PaletteColorLookupTableDescriptor"] = ("US", [count, first, bits])
        found[f"{color}PaletteColorLookupTableData"] = ("OW", data([entry[channel] for entry in COLORS]))
    return found


@pytest.mark.parametrize("syntax", [LITTLE_ENDIAN, BIG_ENDIAN])
def test_palettes_follow_their_descriptors(syntax: str) -> None:
    order = ">" if syntax == BIG_ENDIAN else "<"
    index = np.array([[0, 1, 2, 3]], np.uint8)

    def words(entries: list[int]) -> bytes:
        return struct.pack(f"{order}4H", *entries)

    def packed(entries: list[int]) -> bytes:  # the first entry in the low byte of the word
        return struct.pack(f"{order}2H", entries[0] | entries[1] << 8, entries[2] | entries[3] << 8)

    for attributes in (
        palette(16, lambda entries: words([entry << 8 for entry in entries])),
        palette(16, lambda entries: words([entry << 8 | entry for entry in entries])),
        palette(16, words),  # 8-bit entries that claim to be 16-bit
        palette(8, words),
        palette(8, packed),
    ):
        assert first_row(dicom(index, syntax, **attributes)) == COLORS
    shifted = palette(8, words, first=10)
    assert first_row(dicom(index + 9, syntax, **shifted)) == [COLORS[0], *COLORS[:3]]
    assert first_row(dicom(index + 12, syntax, **shifted)) == [COLORS[2], COLORS[3], COLORS[3], COLORS[3]]


def test_missing_palettes_are_named() -> None:
    index = np.array([[0, 1, 2, 3]], np.uint8)
    with pytest.raises(ImageError, match="has no red palette"):
        load_image(dicom(index, PhotometricInterpretation="PALETTE COLOR"))
    short = palette(8, lambda entries: bytes(entries[:2]))
    with pytest.raises(ImageError, match="holds 2 of 4 entries"):
        load_image(dicom(index, **short))


def test_a_supplemental_palette_colors_its_values() -> None:
    values = np.array([[0, 128, 256, 257]], np.uint16)
    attributes = palette(8, bytes, count=2, first=256) | {"PhotometricInterpretation": "MONOCHROME2"}
    for color, data in (("Red", b"\xff\0"), ("Green", b"\0\xff"), ("Blue", b"\0\0")):
        attributes[f"{color}PaletteColorLookupTableData"] = ("OW", data)
    attributes |= {"BitsStored": 9, "HighBit": 8, "WindowCenter": "128", "WindowWidth": "256"}
    colored = dicom(values, PixelPresentation="COLOR", **attributes)
    assert first_row(colored) == [[0, 0, 0], [128, 128, 128], [255, 0, 0], [0, 255, 0]]
    gray = dicom(values, **attributes)
    assert first_row(gray) == [0, 128, 255, 255] and "shown in gray" in warnings_of(gray)


def groups(**shared: Any) -> dict[str, Any]:
    return {"SharedFunctionalGroupsSequence": [item(**shared)]}


def test_an_empty_element_counts_as_absent() -> None:
    values = np.array([[0, 1, 2, 100]], np.uint16)
    window = [item(WindowCenter="1.5", WindowWidth="4", VOILUTFunction="LINEAR_EXACT")]
    empty = {"WindowCenter": ("DS", ""), "WindowWidth": ("DS", "")}
    assert first_row(dicom(values, **empty, **groups(FrameVOILUTSequence=window))) == [32, 96, 159, 255]
    slope = [item(RescaleSlope="10", RescaleIntercept="0")]
    scaled = groups(PixelValueTransformationSequence=slope)
    bare = {"RescaleSlope": ("DS", ""), "RescaleIntercept": ("DS", "")}
    shown = dicom(values, **bare, **scaled, WindowCenter="10.5", WindowWidth="21")
    assert first_row(shown) == [0, 128, 255, 255]
    assert load_image(dicom(EIGHT, NumberOfFrames=("IS", ""), PixelSpacing=("DS", ""))).size == (4, 1)


def test_the_frames_attribute_has_priority_over_shared_and_top_level() -> None:
    def transform(slope: str) -> Any:
        return [item(RescaleSlope=slope, RescaleIntercept="0")]

    values = np.array([[0, 10, 20, 30]] * 2, np.uint16)
    attributes = {"Rows": 1, "NumberOfFrames": "2", "RescaleSlope": "1", "RescaleIntercept": "0"}
    attributes |= {"WindowCenter": "155", "WindowWidth": "310"}
    per_frame = [item(), item(PixelValueTransformationSequence=transform("10"))]
    frames = dicom(values, **attributes, PerFrameFunctionalGroupsSequence=per_frame)
    assert first_row(frames, frame=0) == [0, 8, 17, 25] and first_row(frames, frame=1) == [0, 83, 165, 248]
    shared = groups(PixelValueTransformationSequence=transform("5"))
    both = dicom(values, **attributes, **shared, PerFrameFunctionalGroupsSequence=per_frame)
    assert first_row(both, frame=0) == [0, 41, 83, 124] and first_row(both, frame=1) == [0, 83, 165, 248]


@pytest.mark.parametrize("bad", ["NaN", "inf", "-inf", "abc", "1e999"])
def test_an_invalid_number_is_ignored_with_a_warning(bad: str) -> None:
    values = np.array([[0, 20, 40, 60]], np.int16)
    for attributes in (
        {"WindowCenter": bad, "WindowWidth": "400"},
        {"WindowCenter": "30", "WindowWidth": bad},
        {"RescaleSlope": bad, "RescaleIntercept": "0"},
        {"RescaleSlope": "1", "RescaleIntercept": bad},
    ):
        raw = {keyword: "9" * len(value) if value == bad else value for keyword, value in attributes.items()}
        data = dicom(values, **raw).replace(b"9" * len(bad), bad.encode())
        assert first_row(data) == STEPS_SHOWN and "is ignored" in warnings_of(data), attributes


def test_unusable_slopes_and_windows_are_ignored_with_a_warning() -> None:
    values = np.array([[0, 20, 40, 60]], np.int16)
    for attributes in (
        {"RescaleSlope": "0", "RescaleIntercept": "0"},
        {"WindowCenter": "30", "WindowWidth": "0"},
        {"WindowCenter": "30", "WindowWidth": "-5"},
    ):
        data = dicom(values, **attributes)
        assert first_row(data) == STEPS_SHOWN and "is ignored" in warnings_of(data)


def test_windows_of_any_positive_width() -> None:
    values = np.array([[0, 100, 200, 300]], np.uint16)
    scaled = {"RescaleSlope": "0.001", "RescaleIntercept": "0", "Modality": "MR"}
    assert first_row(dicom(values, **scaled)) == STEPS_SHOWN
    assert first_row(dicom(values, **scaled, WindowCenter="0.15", WindowWidth="0.3")) == STEPS_SHOWN
    assert first_row(dicom(values, **scaled), center=0.15, width=0.3) == STEPS_SHOWN
    assert first_row(dicom(values, **scaled), center=0.1, width=1e-6) == [0, 128, 255, 255]


def test_the_presentation_lut_shape() -> None:
    inverse = [255, 175, 95, 15]
    assert first_row(dicom(EIGHT, PresentationLUTShape="INVERSE")) == inverse
    assert first_row(dicom(EIGHT, PresentationLUTShape="IDENTITY")) == [0, 80, 160, 240]
    for shape in ("INVERSE", "IDENTITY", None):
        extra = {"PresentationLUTShape": shape} if shape else {}
        assert first_row(dicom(EIGHT, PhotometricInterpretation="MONOCHROME1", **extra)) == inverse


# Pictures


def rotated_jpeg(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An 8 x 6 JPEG with EXIF orientation 6 and further EXIF entries (tag, type, count, value)."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 40, 40)).save(file, "JPEG", quality=95)
    every = [(0x0112, 3, 1, b"\x06\0\0\0"), *entries]
    body = struct.pack("<H", len(every))
    body += b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in every)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + body + b"\0\0\0\0"
    data = file.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 2, 4, b"72\0\0"),  # a resolution as text
        (0x9204, 10, 1, b"\xff\xff\xff\x7f"),  # a rational that points nowhere
        (0x011B, 5, 0xFFFFFFFF, b"\0\0\0\0"),
        (0x0000, 99, 1, b"\0\0\0\0"),
        (0x8769, 4, 1, b"\x08\0\0\0"),  # a directory inside itself
    ],
)
def test_invalid_exif_elsewhere_does_not_matter(entry: tuple[int, int, int, bytes]) -> None:
    image = load_image(rotated_jpeg(entry))
    assert image.size == (6, 8) and image.tobytes() == load_image(rotated_jpeg()).tobytes()


def test_damaged_exif_profiles_and_comments_leave_the_picture() -> None:
    plain = jpeg_frame()
    for kind, body in (
        (0xE1, b"Exif\0\0garbage"),
        (0xE2, b"ICC_PROFILE\0\1\1bad"),
        (0xED, b"Photoshop 3.0\0"),
        (0xFE, b"?"),
    ):
        segment = bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body
        assert load_image(plain[:2] + segment + plain[2:]).tobytes() == load_image(plain).tobytes()


RED = np.tile(np.array([200, 40, 40], np.uint8), (6, 8, 1))


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20))),
        png_chunk(b"iCCP", b"profile\0\0not compressed"),
        png_chunk(b"zTXt", b"no end of the keyword"),
        png_chunk(b"tEXt", b"a\0b", crc=1),
        png_chunk(b"gAMA", b"\0\0", crc=7),
        png_chunk(b"eXIf", b"not exif"),
        png_chunk(b"acTL", b""),
    ],
)
def test_ancillary_chunks_never_make_a_png_unreadable(chunk: bytes) -> None:
    assert load_image(png(RED, 2, 8, chunk)).tobytes() == RED.tobytes()


def test_a_png_rotated_by_exif_is_upright() -> None:
    exif = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 6, 0) + b"\0\0\0\0"
    raw = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 32\n" + (b"Exif\0\0" + exif).hex().encode())
    for chunk in (png_chunk(b"eXIf", exif), png_chunk(b"zTXt", raw)):
        assert load_image(png(RED, 2, 8, chunk)).size == (6, 8)


def test_transparent_colors_are_black_in_every_mode() -> None:
    green = np.array([[[0, 255, 0], [200, 40, 40]]])
    expected = [[0, 0, 0], [200, 40, 40]]
    key8 = png_chunk(b"tRNS", struct.pack(">3H", 0, 255, 0))
    assert first_row(png(green, 2, 8, key8)) == expected
    key_bad_crc = png_chunk(b"tRNS", struct.pack(">3H", 0, 255, 0), crc=3)
    assert first_row(png(green, 2, 8, key_bad_crc)) == expected
    gray = np.array([[0, 90, 255, 90]])
    assert first_row(png(gray, 0, 8, png_chunk(b"tRNS", struct.pack(">H", 90)))) == [0, 0, 255, 0]
    wide = np.array([[0, 1000, 2000, 4095, 60000]])
    assert first_row(png(wide, 0, 16, png_chunk(b"tRNS", struct.pack(">H", 60000)))) == [0, 62, 125, 255, 0]
    wide_color = np.stack([wide] * 3, axis=-1)
    key16 = png_chunk(b"tRNS", struct.pack(">3H", 60000, 60000, 60000))
    assert first_row(png(wide_color, 2, 16, key16)) == [0, 62, 125, 255, 0]
    rgba = np.array([[[255, 255, 255, 0], [200, 100, 0, 255]]])
    assert first_row(png(rgba, 6, 8)) == [[0, 0, 0], [200, 100, 0]]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_transparent_gray_of_few_bits(depth: int) -> None:
    levels = list(range(1 << depth))
    packed = int("".join(f"{level:0{depth}b}" for level in levels).ljust(-(-len(levels) * depth // 8) * 8, "0"), 2)
    raw = b"\0" + packed.to_bytes(-(-len(levels) * depth // 8), "big")
    header = struct.pack(">IIBBBBB", len(levels), 1, depth, 0, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"tRNS", struct.pack(">H", levels[-1]))]
    chunks += [png_chunk(b"IDAT", zlib.compress(raw)), png_chunk(b"IEND", b"")]
    shown = first_row(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert shown == [level * 255 // (len(levels) - 1) for level in levels[:-1]] + [0]


TWELVE = np.array([[0, 1000, 2000, 4095]], np.uint16)
TWELVE_SHOWN = [0, 62, 125, 255]


def test_twelve_of_sixteen_bits_look_the_same_in_every_container() -> None:
    color, alpha = np.stack([TWELVE] * 3, axis=-1), np.full((1, 4, 1), 65535, np.uint16)
    pictures = {
        "gray PNG": png(TWELVE, 0, 16),
        "gray and alpha PNG": png(np.concatenate([TWELVE[..., None], alpha], axis=-1), 4, 16),
        "RGB PNG": png(color, 2, 16),
        "RGBA PNG": png(np.concatenate([color, alpha], axis=-1), 6, 16),
        "gray TIFF": tiff(TWELVE, 1),
        "big-endian gray TIFF": tiff(TWELVE, 1, order=">"),
        "signed TIFF": tiff(TWELVE.astype(np.int16), 1),
        "32-bit TIFF": tiff(TWELVE.astype(np.uint32), 1),
        "float TIFF": tiff(TWELVE.astype(np.float32), 1),
        "RGB TIFF": tiff(color, 2),
        "big-endian RGB TIFF": tiff(color, 2, order=">"),
        "RGBA TIFF": tiff(np.concatenate([color, alpha], axis=-1), 2, (338, 3, 2)),
        "premultiplied TIFF": tiff(np.concatenate([color, alpha], axis=-1), 2, (338, 3, 1)),
        "DICOM": dicom(TWELVE, BitsStored=12, HighBit=11),
    }
    compressed = io.BytesIO()
    Image.fromarray(TWELVE).save(compressed, "TIFF", compression="tiff_lzw")
    pictures["LZW TIFF"] = compressed.getvalue()
    assert {name: first_row(data) for name, data in pictures.items()} == dict.fromkeys(pictures, TWELVE_SHOWN)


def test_white_is_zero_is_inverted_at_every_depth() -> None:
    inverse = [255, 193, 130, 0]
    for samples in (TWELVE, TWELVE.astype(np.float32)):
        assert first_row(tiff(samples, 0)) == inverse
    assert first_row(tiff(EIGHT, 0)) == [255, 175, 95, 15]
    invisible = np.array([[np.nan, 0, 1000, 2000, 4095]], np.float32)
    assert first_row(tiff(invisible, 0)) == [0, *inverse]


def test_a_few_markers_do_not_darken_the_rest() -> None:
    tissue = np.tile(np.arange(64, dtype=np.uint16) * 60, (64, 1))
    tissue[0, :4] = 65535
    color = np.stack([tissue] * 3, axis=-1)
    for data in (png(tissue, 0, 16), png(color, 2, 16), tiff(tissue, 1), tiff(color, 2), dicom(tissue)):
        shown = np.asarray(load_image(data))[..., 0]
        assert shown[1].max() >= 250 and len(np.unique(shown[1])) > 50


def test_partly_transparent_wide_samples_are_blended_over_black() -> None:
    pair = np.array([[[0, 65535], [4095, 65535], [4095, 32768], [4095, 0]]], np.uint16)
    assert first_row(png(pair, 4, 16)) == [0, 255, 128, 0]


def test_files_that_pillow_decodes_wrongly_are_refused() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 4, 2, 8, 0, 0, 2, 2)
    rle4 = b"BM" + struct.pack("<IHHI", 100, 0, 0, 62) + header + b"\0\0\0\0\xff\xff\xff\0" + b"\x04\x01\0\0\0\1\0\0"
    with pytest.raises(ImageError, match="RLE4"):
        load_image(rle4)
    planar = tiff(np.zeros((2, 2, 3), np.uint16), 2, (284, 3, 2))
    with pytest.raises(ImageError, match="separate planes"):
        load_image(planar)


def test_invalid_tags_of_a_tiff_do_not_matter() -> None:
    for extra in ((305, 2, 0xFFFFFFF0), (34675, 7, 0x7FFFFFFF), (34665, 4, 8), (700, 1, 5), (65000, 99, 1)):
        assert first_row(tiff(EIGHT, 1, extra)) == [0, 80, 160, 240]
    assert load_image(tiff(RED, 2, (274, 3, 6))).size == (6, 8)


def test_errors_quote_the_decoders_reason(tmp_path: Path) -> None:
    good = png(RED, 2, 8)
    with pytest.raises(ImageError, match=r"the PNG (header|image) cannot be") as caught:
        load_image(good[: len(good) - 30])
    assert caught.value.code == "image_unreadable" and "cut off" not in str(caught.value)
    locked = tmp_path / "locked.png"
    locked.write_bytes(good)
    locked.chmod(0)
    if not _can_read(locked):
        with pytest.raises(ImageError, match=r"locked\.png: cannot be read"):
            load_image(locked)


def _can_read(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


# The original files of these cases, if they are next to the checkout

SHARED_CASES: dict[str, Row | str] = {
    **dict.fromkeys(("nometa_imp.dcm", "nometa_exp.dcm", "meta_without_ts.dcm", "nopreamble_exp.dcm"), STEPS_SHOWN),
    "voi_neg_wrap.dcm": [10, 10, 10, 60],
    "pal_bigendian.dcm": COLORS,
    "padding_us_signed.dcm": [0] * 12 + STEPS_SHOWN,
    "float_padding.dcm": [0, 0, 128, 255],
    "empty_top_window.dcm": [0, 128, 255, 255],
    "ds_odd4.dcm": STEPS_SHOWN,
    "left_justified.dcm": [0, 16, 128, 255],
    "hsv.dcm": "HSV",
    "plut_inverse.dcm": [255, 175, 95, 15],  # dcm2pnm scales by 256 and gives 96 and 16
    "supplemental.dcm": [[0, 0, 0], [128, 128, 128], [255, 0, 0], [0, 255, 0]],
    "no_SPP.dcm": STEPS_SHOWN,
    "pi_lower.dcm": [0, 80, 160, 240],
    "ts_h264.dcm": "cannot read this compression: MPEG-4 AVC/H.264",
    "slope_0001_map.dcm": STEPS_SHOWN,
    "frames_lie.dcm": [0, 0, 0, 0],
    "spacing_huge_ratio.dcm": [0] * 64,
    "exif_float_as_ascii.jpg": [[200, 40, 40]] * 6,
    "exif_srational_neg1_0.jpg": [[200, 40, 40]] * 6,
    "png_2mb_ztxt.png": [[200, 40, 40]] * 8,
    "png_bad_text_crc.png": [[200, 40, 40]] * 8,
    "rgb_trns.png": [0] * 8,
    "tiff16_min_is_white.tif": [255, 193, 130, 0],
    "rgb16_12bit.png": TWELVE_SHOWN,
    "no_final_delimiter.dcm": [[200, 40, 40]] * 16,
}


@pytest.mark.parametrize("name", SHARED_CASES)
def test_shared_cases(shared_dir: Path, name: str) -> None:
    path, expected = shared_dir / "cases" / name, SHARED_CASES[name]
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    if isinstance(expected, str):
        with pytest.raises(ImageError, match=expected):
            load_image(path.read_bytes())
    else:
        assert first_row(path.read_bytes()) == expected


def test_shared_cases_of_many_values(shared_dir: Path) -> None:
    cases = shared_dir / "cases"
    if not cases.is_dir():
        pytest.skip(f"{cases} is not there")
    # Window 155.5 and 301 on 0, 100, 200, 300.
    assert first_row((cases / "per_frame_vs_top_rescale.dcm").read_bytes(), frame=1) == [0, 81, 166, 251]
    marker = np.asarray(load_image(cases / "grey16_marker.png"))
    assert np.percentile(marker, 95) > 230
