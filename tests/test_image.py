"""Pictures: pixels equal the original's, files are checked before decoding, and unusual files work."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import ImageMode, ImageSettings, to_pixels
from babydoctor.schema import UserError

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def settings(mode: ImageMode, size: int = 16) -> ImageSettings:
    return ImageSettings(size=size, mode=mode, mean=CLIP["mean"], std=CLIP["std"])


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("name", ["ROCO_00278.jpg", "ROCO_01747.jpg"])
def test_pixels_equal_the_original_code(golden: Path, name: str, mode: ImageMode) -> None:
    expected = np.load(golden / "expected" / "reference.npz")[f"pixels/{name}/{mode}"]
    pixels = to_pixels(load_image(golden / "images" / name), ImageSettings.from_processor_dir(golden / "clip", mode))
    assert pixels.dtype == np.float32 and pixels.shape == (3, 56, 56)
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


def test_square_equals_the_processor_of_transformers_for_odd_shapes() -> None:
    transformers = pytest.importorskip("transformers")
    # The PIL backend, because the torchvision backend resizes a little differently.
    processor_class = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = processor_class(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    rng = np.random.default_rng(0)
    for height, width in ((16, 16), (17, 40), (40, 17), (5, 9), (33, 100), (100, 33)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(to_pixels(image, settings("square")), expected, atol=1e-5)


def test_pad_keeps_what_square_crops() -> None:
    image = Image.new("RGB", (90, 30), "black")
    image.paste((255, 255, 255), (0, 0, 6, 30))  # a bright strip at the left edge
    cut, kept = to_pixels(image, settings("square")), to_pixels(image, settings("pad"))
    assert cut.max() < 0 < kept.max()
    # The bars have the mean color, so they are nearly 0 after normalization.
    assert np.abs(kept[:, :4]).max() < 0.02


def test_very_thin_pictures_stay_within_memory() -> None:
    image = Image.new("RGB", (40_000, 700), (9, 9, 9))
    for mode in ("square", "pad"):
        assert to_pixels(image, settings(mode)).shape == (3, 16, 16)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="strip"):
        load_image(encoded(Image.new("L", (7000, 100))))


def test_settings_come_from_old_and_new_processor_files(tmp_path: Path, golden: Path) -> None:
    expected = ImageSettings.from_processor_dir(golden / "clip", "pad")
    old = json.loads((golden / "clip" / "preprocessor_config.json").read_text())
    for name, config in (
        ("preprocessor_config.json", old | {"size": 56, "crop_size": 56}),
        ("preprocessor_config.json", old | {"size": {"height": 56, "width": 56}}),
        ("processor_config.json", {"image_processor": old, "processor_class": "CLIPProcessor"}),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_text(json.dumps(config))
        assert ImageSettings.from_processor_dir(folder, "pad") == expected
    assert ImageSettings(**json.loads(json.dumps(asdict(expected)))) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": {"height": 48, "width": 48}}, "crop_size 48 differs from size 56"),
        ({"resample": 2}, "resample is 2"),
        ({"size": None}, "needs size"),
        ({"image_std": [1, 1, 0]}, "std above 0"),
    ],
)
def test_other_processors_are_refused(tmp_path: Path, golden: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((golden / "clip" / "preprocessor_config.json").read_text()) | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        ImageSettings.from_processor_dir(tmp_path, "square")


def test_wrong_modes_and_missing_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'crop'"):
        settings("crop")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        ImageSettings.from_processor_dir(tmp_path, "pad")
    with pytest.raises(UserError, match="neither a directory here nor the id of a model"):
        ImageSettings.from_processor_dir(tmp_path / "nowhere", "pad")


def test_sixteen_bit_grayscale_is_stretched_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(1000, 3000, 64, dtype=np.uint16).reshape(8, 8)  # about ten bits, like scanners
    for name in ("gray.png", "gray.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        shown = np.asarray(load_image(tmp_path / name))
        assert shown[0, 0].tolist() == [0, 0, 0] and shown[-1, -1].tolist() == [255, 255, 255]
        assert len(np.unique(shown)) > 60
    Image.fromarray(np.full((4, 4), 7, np.uint16)).save(tmp_path / "flat.png")
    assert np.asarray(load_image(tmp_path / "flat.png")).max() == 0
    floats = np.array([[0.5, np.nan], [np.inf, -1.0]], np.float32)
    Image.fromarray(floats).save(tmp_path / "float.tiff")
    assert np.asarray(load_image(tmp_path / "float.tiff"))[..., 0].tolist() == [[255, 0], [255, 0]]


def test_gray_palette_bilevel_and_cmyk_become_rgb() -> None:
    red = Image.new("RGB", (6, 6), (255, 0, 0))
    assert load_image(encoded(Image.new("L", (6, 6), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(encoded(Image.new("1", (6, 6), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(red.convert("P", palette=Image.Palette.ADAPTIVE))).getpixel((0, 0)) == (255, 0, 0)
    assert load_image(encoded(red.convert("CMYK"), "JPEG")).mode == "RGB"
    for format in ("WEBP", "BMP", "TIFF", "GIF"):
        assert load_image(encoded(red, format)).getpixel((3, 3))[0] > 240  # type: ignore[index]


def test_transparency_becomes_black() -> None:
    image = Image.new("RGBA", (6, 6), (255, 255, 255, 0))  # invisible white
    image.putpixel((1, 1), (200, 100, 0, 255))
    shown = load_image(encoded(image))
    assert shown.getpixel((0, 0)) == (0, 0, 0) and shown.getpixel((1, 1)) == (200, 100, 0)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 255, 255, 0, 0, 0])
    assert load_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (0, 0, 0)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), "black")
    image.paste((255, 255, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn by 90 degrees clockwise
    upright = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2))[0] > 200 > 50 > upright.getpixel((5, 17))[0]  # type: ignore[index]


def test_size_is_checked_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(UserError, match=r"too large|the limit is"):
        load_image(bomb)
    with pytest.raises(UserError, match=r"100 x 90 = 9,000 pixels; the limit is 8,000"):
        load_image(encoded(Image.new("L", (100, 90))), max_pixels=8000)


@pytest.mark.filterwarnings("ignore:Metadata Warning", "ignore:Truncated File Read")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_every_truncation_and_damage_is_a_user_error(format: str) -> None:
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)), format)
    for length in range(0, len(data) - 1, max(1, len(data) // 25)):
        try:
            load_image(data[:length])
        except UserError:
            continue
        assert length > len(data) * 0.9, f"{format} cut to {length} of {len(data)} bytes was taken"
    for _ in range(30):
        damaged = bytearray(data)
        damaged[int(rng.integers(0, min(200, len(data))))] ^= 0xFF
        with contextlib.suppress(UserError):
            load_image(bytes(damaged))


def test_files_that_are_not_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.jpg: not a PNG"):
        load_image(tmp_path / "page.jpg")
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match="0 bytes"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(UserError, match="no such image file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot be read"):
        load_image(tmp_path)
    with pytest.raises(UserError, match="not a PNG"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
