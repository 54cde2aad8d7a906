"""DICOM -> RGB, in the standard's order (PS3.3 C.11, PS3.4 N.2): modality LUT, VOI LUT or window, presentation LUT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom.file import parse_file
from babydoctor.imaging.dicom.gray import read_gray
from babydoctor.imaging.dicom.header import read_layout
from babydoctor.imaging.dicom.image import DicomImage
from babydoctor.imaging.dicom.lut import supplemental_colors, to_color
from babydoctor.imaging.dicom.pixels import decode_frame
from babydoctor.imaging.dicom.safety import reading_values
from babydoctor.imaging.dicom.values import (
    code,
    pixel_shape,
    pixel_spacing,
    windows,
)
from babydoctor.imaging.limits import MAX_PIXELS, ImageError, check_size
from babydoctor.imaging.windows import CT_PRESETS, Window


def read_dicom(source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> DicomImage:
    """Read the header of a DICOM image; ``name`` stands for the file in messages when ``source`` is bytes.

    Raises:
        ImageError: it is not DICOM, holds no image, is of an unsupported kind, or a frame has more than
            ``max_pixels`` pixels.
    """
    if isinstance(source, bytes):
        name, data = name or f"DICOM of {len(source)} bytes", source
    else:
        name = name or str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror})", "image_missing") from error
    with reading_values(name):
        file = parse_file(data, name, max_pixels)
        layout, assumed = read_layout(file, name, max_pixels)
        warnings = list(assumed)
        return DicomImage(
            name=name,
            layout=layout,
            modality=code(file.dataset, "Modality"),
            pixel_spacing=pixel_spacing(file.dataset, 0),
            windows=windows(file.dataset, 0, warnings),
            warnings=tuple(dict.fromkeys(warnings)),
            dataset=file.dataset,
            data=data,
        )


def render(
    dicom: DicomImage,
    frame: int = 0,
    center: float | None = None,
    width: float | None = None,
    preset: str | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    square_pixels: bool = True,
) -> Image.Image:
    """One frame as an RGB picture, stretched if its pixels are not square.

    Gray frames are shown under ``center`` and ``width``, or the CT ``preset``, or the file's first window or VOI
    LUT, or else a window computed from the frame's values. ``image.info["window"]`` says which one was used, and
    ``image.info["warnings"]`` what was unclear in the file and how it was interpreted.

    Raises:
        ImageError: the frame, window or preset does not exist, or the pixels cannot be decoded.
    """
    with reading_values(dicom.name):
        image, warnings = _render(dicom, frame, _chosen_window(dicom, center, width, preset))
        explanation = image.info["window"]
        if square_pixels:
            image = _square_pixels(dicom, frame, image, warnings, max_pixels)
        image.info["window"] = explanation
        image.info["warnings"] = tuple(dict.fromkeys(warnings))
        return image


def _render(dicom: DicomImage, frame: int, chosen: Window | None) -> tuple[Image.Image, list[str]]:
    """One frame with the file's own pixels, and the warnings about it."""
    warnings = list(dicom.warnings)
    if not dicom.is_gray and chosen is not None:
        raise ImageError(
            f"{dicom.name}: a color image ({dicom.photometric}) has no window; leave it out", "invalid_input"
        )
    values, cells = decode_frame(dicom, frame, warnings)
    if dicom.is_gray:
        frame_values = read_gray(dicom, values, cells, frame, warnings)
        shown, explanation = frame_values.shown(chosen)
        image = Image.fromarray(frame_values.spread(shown)).convert("RGB")
        image = supplemental_colors(dicom, image, values, warnings)
    else:
        image, explanation = Image.fromarray(to_color(dicom, values, warnings)), "color, as stored"
    image.info["window"] = explanation
    return image, warnings


def _chosen_window(dicom: DicomImage, center: float | None, width: float | None, preset: str | None) -> Window | None:
    if preset is not None:
        if preset not in CT_PRESETS:
            raise ImageError(f"window preset {preset!r}: must be one of {', '.join(CT_PRESETS)}", "invalid_input")
        if dicom.modality != "CT":
            raise ImageError(
                f"{dicom.name}: preset {preset!r} is for CT, this is {dicom.modality or 'unknown'}", "invalid_input"
            )
        if center is not None or width is not None:
            raise ImageError(f"give either the preset {preset!r} or a center and a width, not both", "invalid_input")
        return CT_PRESETS[preset]
    if (center is None) != (width is None):
        raise ImageError(f"window center {center} and width {width}: give both or neither", "invalid_input")
    if center is None or width is None:
        return None
    if not (np.isfinite(center) and np.isfinite(width) and width > 0):
        raise ImageError(
            f"window center {center} and width {width}: the width must be above 0, usually at least 1", "invalid_input"
        )
    return Window(float(center), float(width), "chosen")


def _square_pixels(
    dicom: DicomImage, frame: int, image: Image.Image, warnings: list[str], max_pixels: int
) -> Image.Image:
    """Stretch the axis with the larger spacing. Otherwise a reformatted CT with 3 mm slices looks squashed."""
    vertical, horizontal = pixel_shape(dicom.dataset, frame, warnings)
    if abs(vertical / horizontal - 1) < 0.01:
        return image
    finest = min(vertical, horizontal)
    size = (round(image.width * horizontal / finest), round(image.height * vertical / finest))
    try:
        check_size(*size, f"{dicom.name} with square pixels", max_pixels)
    except ImageError:
        warnings.append(f"with square pixels the picture would have {size[0]} x {size[1]}; it is shown unstretched")
        return image
    return image.resize(size, Image.Resampling.BILINEAR)
