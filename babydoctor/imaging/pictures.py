"""PNG, JPEG, WebP, GIF, BMP and TIFF -> upright RGB picture, the same for every mode and container.

8-bit samples are shown as stored. Wider samples are windowed by ``windows.window_of_values`` over all visible pixels,
as for DICOM files without a window, because files rarely say how many bits are used. Transparent pixels are black.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from babydoctor.imaging.containers import PNG_MAGIC, Container, clean, picture_format
from babydoctor.imaging.limits import MAX_PIXELS, ImageError, check_size
from babydoctor.imaging.windows import apply_window, window_of_values

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_BI_RLE4 = 2


@dataclass(frozen=True)
class Picture:
    """A picture file whose header has been read and whose pixels have not been decoded. It can be decoded once."""

    name: str
    container: Container = field(repr=False)
    image: Image.Image = field(repr=False)

    @property
    def is_wide(self) -> bool:
        """True if samples have more than 8 bits."""
        if self.image.mode.startswith(("I", "F")) or self.container.bit_depth > 8:
            return True
        return _wide_color_rawmode(self.image) is not None


def decode_picture(picture: Picture) -> Image.Image:
    """Decode a picture file; of an animation the first picture.

    Raises:
        ImageError: it is damaged or cannot be decoded correctly.
    """
    name, container, image = picture.name, picture.container, picture.image
    try:
        image = _to_rgb(image, container, name)
    except MemoryError as error:
        raise ImageError(f"{name}: decoding needs more memory than allowed", "image_decode_failed") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
        text = f"{name}: the {container.format} image cannot be decoded ({_short(error)})"
        raise ImageError(text, "image_unreadable") from error
    return image.transpose(_UPRIGHT[container.orientation]) if container.orientation in _UPRIGHT else image


def open_picture(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the header of a picture file. The format is recognized by content.

    Raises:
        ImageError: it is not a picture, its header is damaged, or it has more than ``max_pixels`` pixels.
    """
    format = picture_format(data)
    if format is None:
        raise ImageError(f"{name}: not a PNG, JPEG, DICOM, WebP, GIF, BMP or TIFF image", "image_unreadable")
    container = clean(data, format)
    _check_variant(container, name)
    try:
        image = _open(container)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too large to decode safely ({error})", "image_too_large") from error
    except Exception as error:  # Pillow's header parsers raise many kinds of errors on damaged files
        raise ImageError(f"{name}: the {format} header cannot be read ({_short(error)})", "image_unreadable") from error
    check_size(image.width, image.height, name, max_pixels)
    return Picture(name, container, image)


def _check_variant(container: Container, name: str) -> None:
    """Refuse files that Pillow decodes wrongly without an error."""
    if container.format == "BMP" and container.data[14:15] >= b"\x28":
        compression = int.from_bytes(container.data[30:34], "little")
        if compression == _BI_RLE4:
            raise ImageError(
                f"{name}: a BMP with 4-bit run-length compression (RLE4) is not supported; save it as PNG",
                "image_unreadable",
            )


def _open(container: Container) -> Image.Image:
    data = container.data
    if container.color_type == 4 and container.bit_depth == 16:
        data = _gray_alpha_as_rgba(data)
    return Image.open(io.BytesIO(data), formats=(container.format,))


def _gray_alpha_as_rgba(data: bytes) -> bytes:
    """A 16-bit gray and alpha PNG as an 8-bit RGBA one. Both have four bytes per pixel, so only the header changes.

    Pillow reads only the high bytes of 16-bit gray and alpha. As RGBA, red and green are the high and low byte of gray.
    """
    header = data[16:24] + b"\x08\x06" + data[26:29]
    chunk = b"IHDR" + header
    return PNG_MAGIC + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def _to_rgb(image: Image.Image, container: Container, name: str) -> Image.Image:
    if container.color_type == 4 and container.bit_depth == 16:
        pairs = np.asarray(image).astype(np.uint16)  # [h, w, 4]
        return _window_samples(pairs[..., 0] * 256 + pairs[..., 1], pairs[..., 2] * 256 + pairs[..., 3])
    if container.is_planar_wide:
        raise ImageError(f"{name}: a TIFF with separate planes of 16-bit samples is not supported", "image_unreadable")
    if (rawmode := _wide_color_rawmode(image)) is not None:
        return _wide_color(image, container, rawmode)
    image.load()
    if image.mode.startswith(("I", "F")):
        return _wide_gray(np.asarray(image), container)
    key = container.transparent_key
    if key is not None:
        return _clear_key(image, key, container.bit_depth)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # convert("RGB") would drop alpha and show whatever color lies under transparent pixels.
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _clear_key(image: Image.Image, key: tuple[int, ...], depth: int) -> Image.Image:
    """Make PNG's transparent color black, in a gray or RGB picture with up to 8 bits."""
    shown = np.asarray(image.convert("RGB")).copy()  # [h, w, 3]
    levels = np.array(key) * 255 // ((1 << min(depth, 8)) - 1)
    shown[(shown == levels).all(axis=-1)] = 0
    return Image.fromarray(shown)


def _wide_gray(values: np.ndarray, container: Container) -> Image.Image:
    """Grayscale ``[h, w]`` of 16 bits, 32 bits or floats -> RGB."""
    visible = None
    if container.transparent_key is not None:
        visible = values != container.transparent_key[0]
    gray = _window(values, visible)
    if container.is_white_zero:
        gray = np.where(np.isnan(values), 0, 255 - gray)  # NaN stays black
    if visible is not None:
        gray[~visible] = 0
    return Image.fromarray(gray).convert("RGB")


def _wide_color_rawmode(image: Image.Image) -> str | None:
    """The raw mode of a picture with 16-bit colors, which Pillow cuts to their high bytes; else None."""
    for tile in image.tile if hasattr(image, "tile") else ():
        args = tile.args if isinstance(tile.args, str) else tile.args[0] if tile.args else ""
        if isinstance(args, str) and ";16" in args and not args.startswith("I;"):
            return args
    return None


def _wide_color(image: Image.Image, container: Container, rawmode: str) -> Image.Image:
    """16-bit RGB, with or without alpha.

    Pillow keeps one byte of each sample. Decoding once normally and once with the byte order swapped gives both bytes.
    """
    layout, _, order = rawmode.partition(";16")
    if layout not in ("RGB", "RGBX", "RGBA", "RGBa") or order not in ("B", "L", "N"):
        raise ValueError(f"16-bit samples of kind {rawmode} are not supported")
    order = order if order != "N" else "L" if sys.byteorder == "little" else "B"
    again = _open(container)
    stored = "RGBA" if layout == "RGBa" else layout
    high = np.asarray(_with_rawmode(image, f"{stored};16{order}")).astype(np.uint16)
    values = high * 256 + np.asarray(_with_rawmode(again, f"{stored};16{'B' if order == 'L' else 'L'}"))
    if layout == "RGBa":  # already multiplied by alpha, which is how it looks over black
        return _window_samples(values[..., :3], (values[..., 3] > 0) * np.uint16(65535))
    if values.shape[2] == 4:
        return _window_samples(values[..., :3], values[..., 3])
    visible = None
    if container.transparent_key is not None:
        visible = (values != np.array(container.transparent_key)).any(axis=-1)
    return _window_samples(values, None if visible is None else visible * np.uint16(65535))


def _with_rawmode(image: Image.Image, rawmode: str) -> Image.Image:
    """The same file before decoding, with another raw mode for its samples."""
    tiles = image.tile  # type: ignore[attr-defined]
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:])) for tile in tiles
    ]
    return image


def _window_samples(values: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    """Blend 16-bit samples ``[h, w]`` or ``[h, w, 3]`` with 16-bit alpha ``[h, w]`` over black, as RGB."""
    shown = _window(values, None if alpha is None else alpha > 0)
    if alpha is not None:
        opacity = alpha.astype(np.float32) / 65535
        shown = (shown * (opacity if shown.ndim == 2 else opacity[..., None])).round().astype(np.uint8)
    return Image.fromarray(shown).convert("RGB")


def _window(values: np.ndarray, visible: np.ndarray | None) -> np.ndarray:
    """Samples of any type -> uint8 under one window for all channels; a picture of a single level is black."""
    window = window_of_values(values if visible is None else values[visible], "picture")
    if window.width <= 1e-12:
        return np.zeros(values.shape, np.uint8)
    rows = [(apply_window(row, window) * 255).round().astype(np.uint8) for row in values]
    return np.stack(rows)


def _short(error: Exception) -> str:
    """The first line of a library's message, without memory addresses, which Pillow prints."""
    text = re.sub(r"\s*<_io\.BytesIO[^>]*>", "", str(error).partition("\n")[0])
    return text or type(error).__name__
