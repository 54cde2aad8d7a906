"""Decide how the pixels of a DICOM file are stored. What is not supported is refused with an error that names it.

A missing type 1 element that can only have one value is filled in, with a warning for the user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from babydoctor.imaging.dicom.file import PIXEL_KEYWORDS, DicomFile, describe_uid, fragments
from babydoctor.imaging.dicom.safety import codestream_size
from babydoctor.imaging.dicom.values import code, integer, text
from babydoctor.imaging.limits import ImageError, check_size

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_SAMPLES: dict[str, int] = {
    **dict.fromkeys((*_GRAY, "PALETTE COLOR"), 1),
    **dict.fromkeys(("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"), 3),
}
"""The photometric interpretations that are shown, and their samples per pixel."""

# Projection X-ray comes as MONOCHROME1 about as often as MONOCHROME2, so a missing value could mean either.
_EITHER_POLARITY = frozenset(("CR", "DX", "MG", "RG", "PX", "IO", "RF", "XA", ""))

_JPEG_2000 = ("1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20")
_RLE = "1.2.840.10008.1.2.5"
_DECODER_HINT = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"


@dataclass(frozen=True)
class PixelLayout:
    """How pixels are stored. ``is_signed`` is None if the file does not say; signed and unsigned must then agree."""

    transfer_syntax: str
    is_encapsulated: bool
    is_big_endian: bool
    keyword: str
    rows: int
    columns: int
    num_frames: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool | None
    is_planar: bool
    photometric: str

    @property
    def is_float(self) -> bool:
        return self.keyword != "PixelData"

    @property
    def frame_bits(self) -> int:
        """Bits of one uncompressed frame."""
        samples = 2 if self.photometric == "YBR_FULL_422" and not self.is_encapsulated else self.samples
        return self.rows * self.columns * samples * self.bits_allocated


def read_layout(file: DicomFile, name: str, max_pixels: int) -> tuple[PixelLayout, tuple[str, ...]]:
    """Decide the layout of a file's pixels, with warnings about assumptions.

    Raises:
        ImageError: something is missing, contradictory or not supported.
    """
    dataset, warnings = file.dataset, list(file.warnings)
    keyword = next(key for key in PIXEL_KEYWORDS if key in dataset)
    data = dataset[keyword].value or b""
    _check_decoder(file, name)
    first = next(iter(fragments(data)), b"") if file.is_encapsulated else b""
    rows, columns = _size(dataset, first, name, warnings)
    check_size(columns, rows, name, max_pixels)
    photometric, samples = _color(dataset, name, warnings, is_float=keyword != "PixelData")
    if photometric in ("YBR_RCT", "YBR_ICT") and not file.transfer_syntax.startswith(_JPEG_2000):
        raise ImageError(f"{name}: {photometric} is for JPEG 2000 only", "dicom_unsupported")
    frames = _stated_frames(dataset, name, warnings)
    is_signed: bool | None = True
    if keyword != "PixelData":
        allocated = stored = 32 if keyword == "FloatPixelData" else 64
        high_bit = stored - 1
    else:
        size = None if file.is_encapsulated else len(data)
        allocated, stored, high_bit = _bits(dataset, rows * columns * samples * frames, size, name, warnings)
        is_signed = _sign(dataset, stored, samples, name, warnings)
    planar = integer(dataset, "PlanarConfiguration")
    if samples == 3 and planar not in (0, 1):
        warnings.append("PlanarConfiguration is missing; read as color by pixel")
    layout = PixelLayout(
        transfer_syntax=file.transfer_syntax,
        is_encapsulated=file.is_encapsulated,
        is_big_endian=file.is_big_endian,
        keyword=keyword,
        rows=rows,
        columns=columns,
        num_frames=frames,
        samples=samples,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit,
        is_signed=is_signed,
        is_planar=samples == 3 and planar == 1,
        photometric=photometric,
    )
    return _fit_to_data(layout, data, name, warnings), tuple(dict.fromkeys(warnings))


def _check_decoder(file: DicomFile, name: str) -> None:
    if not file.is_encapsulated or file.transfer_syntax == _RLE:
        return
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(file.transfer_syntax)
    except NotImplementedError:
        raise ImageError(
            f"{name}: cannot read this compression: {describe_uid(file.transfer_syntax)}", "dicom_unsupported"
        ) from None
    if not decoder.is_available:
        raise ImageError(
            f"{name}: cannot be decoded, a decoder is missing for {describe_uid(file.transfer_syntax)}: "
            f"{_DECODER_HINT}",
            "dicom_without_decoder",
        )


def _size(dataset: Any, first: bytes, name: str, warnings: list[str]) -> tuple[int, int]:
    rows, columns = integer(dataset, "Rows") or 0, integer(dataset, "Columns") or 0
    inside = codestream_size(first)
    if (rows < 1 or columns < 1) and inside is not None:
        columns, rows = inside
        warnings.append(f"Rows or Columns is missing; the compressed picture has {columns} x {rows} pixels")
    if rows < 1 or columns < 1:
        raise ImageError(f"{name}: the DICOM header gives no size (Rows {rows}, Columns {columns})", "dicom_unreadable")
    return rows, columns


def _color(dataset: Any, name: str, warnings: list[str], *, is_float: bool) -> tuple[str, int]:
    """(photometric interpretation, samples per pixel)."""
    stated, samples = text(dataset, "PhotometricInterpretation"), integer(dataset, "SamplesPerPixel")
    shown = code(dataset, "PhotometricInterpretation") or "an unreadable value"
    if not stated:
        photometric = _missing_photometric(dataset, samples, name, warnings, is_float=is_float)
    else:
        by_letters = {re.sub(r"[ _]", "", known): known for known in _SAMPLES}
        photometric = by_letters.get(re.sub(r"[\s_]", "", stated.upper()), "")
        if not photometric:
            raise ImageError(f"{name}: the photometric interpretation {shown!r} is not supported", "dicom_unsupported")
        if photometric != stated:
            warnings.append(f"PhotometricInterpretation is written {shown!r}; read as {photometric}")
    if samples is None:
        samples = _SAMPLES[photometric]
        warnings.append(f"SamplesPerPixel is missing; read as {samples}")
    if samples != _SAMPLES[photometric]:
        raise ImageError(
            f"{name}: {photometric} with {samples} samples per pixel contradicts itself", "dicom_unreadable"
        )
    return photometric, samples


def _missing_photometric(dataset: Any, samples: int | None, name: str, warnings: list[str], *, is_float: bool) -> str:
    shape = text(dataset, "PresentationLUTShape").upper()
    if samples in (None, 1) and "RedPaletteColorLookupTableDescriptor" not in dataset:
        if shape in ("IDENTITY", "INVERSE"):
            photometric = "MONOCHROME1" if shape == "INVERSE" else "MONOCHROME2"
        elif is_float or text(dataset, "Modality") not in _EITHER_POLARITY:
            photometric = "MONOCHROME2"
        else:
            raise ImageError(
                f"{name}: PhotometricInterpretation is missing, and for {code(dataset, 'Modality') or 'this modality'} "
                "low values may be dark or bright",
                "dicom_unreadable",
            )
        warnings.append(f"PhotometricInterpretation is missing; read as {photometric}")
        return photometric
    raise ImageError(
        f"{name}: PhotometricInterpretation is missing with {samples} samples per pixel; its colors are unknown",
        "dicom_unreadable",
    )


def _stated_frames(dataset: Any, name: str, warnings: list[str]) -> int:
    if "NumberOfFrames" not in dataset or dataset.get_item("NumberOfFrames").value in (None, b"", ""):
        return 1
    frames = integer(dataset, "NumberOfFrames")
    if frames is None:
        raise ImageError(f"{name}: NumberOfFrames is not a whole number", "dicom_unreadable")
    if frames < 1:
        warnings.append(f"NumberOfFrames is {frames}; read as 1")
        return 1
    return frames


def _bits(dataset: Any, num_samples: int, size: int | None, name: str, warnings: list[str]) -> tuple[int, int, int]:
    """(bits allocated, bits stored, high bit). ``size`` is that of uncompressed pixel data."""
    allocated, stored = integer(dataset, "BitsAllocated"), integer(dataset, "BitsStored")
    high_bit = integer(dataset, "HighBit")
    if allocated is None:
        allocated = _bits_from_size(num_samples, size) or (-(-stored // 8) * 8 if stored else None)
        if allocated is None:
            raise ImageError(f"{name}: BitsAllocated and BitsStored are missing", "dicom_unreadable")
        warnings.append(f"BitsAllocated is missing; read as {allocated}")
    if allocated not in (1, 8, 16, 32):
        raise ImageError(
            f"{name}: {allocated} bits allocated are not supported; 1, 8, 16 and 32 are", "dicom_unsupported"
        )
    if stored is None:
        stored = high_bit + 1 if high_bit is not None and 0 <= high_bit < allocated else allocated
        warnings.append(f"BitsStored is missing; read as {stored}")
    if not 1 <= stored <= allocated:
        raise ImageError(f"{name}: BitsStored is {stored} of {allocated} bits allocated", "dicom_unreadable")
    if high_bit is None or not stored - 1 <= high_bit < allocated:
        stated = "missing" if high_bit is None else f"{high_bit} with {stored} bits stored"
        warnings.append(f"HighBit is {stated}; read as {stored - 1}")
        high_bit = stored - 1
    return allocated, stored, high_bit


def _bits_from_size(num_samples: int, size: int | None) -> int | None:
    for bits in (8, 16, 32):
        expected = num_samples * bits // 8
        if size is not None and size in (expected, expected + expected % 2):
            return bits
    return None


def _sign(dataset: Any, stored: int, samples: int, name: str, warnings: list[str]) -> bool | None:
    sign = integer(dataset, "PixelRepresentation")
    if sign in (0, 1):
        return sign == 1
    if sign is not None:
        raise ImageError(f"{name}: PixelRepresentation is {sign}; must be 0 or 1", "dicom_unreadable")
    if stored <= 8 or samples == 3:
        warnings.append("PixelRepresentation is missing; read as unsigned")
        return False
    warnings.append("PixelRepresentation is missing; the values are the same signed and unsigned")
    return None


def _fit_to_data(layout: PixelLayout, data: bytes, name: str, warnings: list[str]) -> PixelLayout:
    """Compare the header with the pixel data. Missing frames are a warning; no frame at all is an error."""
    if layout.is_encapsulated:
        available = len(fragments(data))
    else:
        full_bits = layout.rows * layout.columns * layout.samples * layout.bits_allocated
        expected = -(-full_bits * layout.num_frames // 8)
        if layout.photometric == "YBR_FULL_422" and len(data) in (expected, expected + expected % 2):
            warnings.append("YBR_FULL_422 is stored at full resolution; read as YBR_FULL")
            layout = replace(layout, photometric="YBR_FULL")
        available = 8 * len(data) // layout.frame_bits
        if 8 * len(data) >= layout.frame_bits * (layout.num_frames + 1) and len(data) > 1:
            warnings.append(f"the pixel data is longer than {layout.num_frames} frame(s); the rest is not shown")
    if available < 1:
        raise ImageError(
            f"{name}: the pixel data is cut off: {len(data):,} bytes, one frame needs {-(-layout.frame_bits // 8):,}",
            "dicom_unreadable",
        )
    if available < layout.num_frames:
        warnings.append(f"the header says {layout.num_frames} frames, the file holds {available}")
        layout = replace(layout, num_frames=available)
    return layout
