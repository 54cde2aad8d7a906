"""One frame of a DICOM file -> stored values, as ``PixelLayout`` describes them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom.header import PixelLayout
from babydoctor.imaging.dicom.image import DicomImage
from babydoctor.imaging.dicom.safety import codestream_header
from babydoctor.imaging.limits import ImageError

_RLE = "1.2.840.10008.1.2.5"


def decode_frame(dicom: DicomImage, frame: int, warnings: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """(stored values, cells) of one frame.

    Values are ``[rows, columns]``, or ``[rows, columns, 3]`` with YBR converted to RGB. ``cells`` are the values with
    all allocated bits, which a padding value may use; None if there are no additional bits.

    Raises:
        ImageError: there is no such frame, or it cannot be decoded.
    """
    layout = dicom.layout
    if not 0 <= frame < layout.num_frames:
        raise ImageError(
            f"{dicom.name}: frame {frame} does not exist; it has frames 0 to {layout.num_frames - 1}", "invalid_input"
        )
    data = bytes(dicom.dataset[layout.keyword].value)
    if layout.is_float:
        return _float_frame(layout, data, frame), None
    if not layout.is_encapsulated:
        cells = _shape(layout, _native_cells(dicom, data, frame))
    elif layout.transfer_syntax == _RLE:
        cells = _shape(layout, _rle_cells(layout, _encoded_frame(dicom, data, frame), dicom.name))
    else:
        return _codec_values(dicom, data, frame, warnings), None
    values = _stored_values(layout, cells, dicom.name, warnings)
    if layout.photometric.startswith("YBR"):
        values = _rgb_from_ybr(layout, values, dicom.name)
    has_spare_bits = layout.bits_stored < layout.bits_allocated and layout.high_bit == layout.bits_stored - 1
    return values, cells if has_spare_bits else None


def _float_frame(layout: PixelLayout, data: bytes, frame: int) -> np.ndarray:
    kind = f"{'>' if layout.is_big_endian else '<'}f{layout.bits_allocated // 8}"
    count = layout.rows * layout.columns
    values = np.frombuffer(data, kind, count, frame * layout.frame_bits // 8)
    return values.astype(kind[1:]).reshape(layout.rows, layout.columns)


def _native_cells(dicom: DicomImage, data: bytes, frame: int) -> np.ndarray:
    """Uncompressed cells of a frame as a flat array of unsigned integers."""
    layout = dicom.layout
    count = layout.frame_bits // layout.bits_allocated
    is_word = str(dicom.dataset["PixelData"].VR) == "OW"
    if layout.is_big_endian and is_word and layout.bits_allocated <= 8:
        even = data[: len(data) // 2 * 2]
        data = np.frombuffer(even, ">u2").astype("<u2").tobytes() + data[len(even) :]
    if layout.bits_allocated == 1:
        first, end = frame * count, (frame + 1) * count
        bits = np.unpackbits(np.frombuffer(data, np.uint8)[first // 8 : -(-end // 8)], bitorder="little")
        return bits[first % 8 : first % 8 + count]
    kind = f"{'>' if layout.is_big_endian else '<'}u{layout.bits_allocated // 8}"
    cells = np.frombuffer(data, kind, count, frame * layout.frame_bits // 8).astype(kind[1:])
    return _full_resolution(layout, cells) if layout.photometric == "YBR_FULL_422" else cells


def _full_resolution(layout: PixelLayout, cells: np.ndarray) -> np.ndarray:
    """YBR_FULL_422's Y1 Y2 Cb Cr for each two pixels -> Y Cb Cr for each pixel."""
    y1, y2, blue, red = cells.reshape(-1, 4).T
    return np.stack([y1, blue, red, y2, blue, red], axis=-1).ravel()


def _encoded_frame(dicom: DicomImage, data: bytes, frame: int) -> bytes:
    from pydicom.encaps import get_frame

    offsets = _extended_offsets(dicom.dataset)
    return get_frame(data, frame, number_of_frames=dicom.num_frames, extended_offsets=offsets)


def _rle_cells(layout: PixelLayout, encoded: bytes, name: str) -> np.ndarray:
    """RLE Lossless (PS3.5 annex G): one PackBits segment for each byte of each sample, high bytes first."""
    count, width = layout.rows * layout.columns, layout.bits_allocated // 8
    header = struct.unpack_from("<16I", encoded)
    num_segments = header[0]
    if num_segments != width * layout.samples or width < 1:
        raise ImageError(
            f"{name}: the RLE data has {num_segments} segments, the header needs {width * layout.samples}",
            "dicom_unreadable",
        )
    ends = [*header[2 : num_segments + 1], len(encoded)]
    cells = np.zeros((layout.samples, count, width), np.uint8)
    for segment, (start, end) in enumerate(zip(header[1 : num_segments + 1], ends, strict=True)):
        try:
            plane = Image.frombytes("L", (count, 1), encoded[start:end], "packbits", "L")
        except ValueError as error:
            raise ImageError(f"{name}: RLE segment {segment} is damaged ({error})", "dicom_unreadable") from error
        cells[segment // width, :, width - 1 - segment % width] = np.asarray(plane)[0]
    return cells.view(f"<u{width}")[..., 0].T.ravel()  # color by pixel


def _shape(layout: PixelLayout, cells: np.ndarray) -> np.ndarray:
    if layout.samples == 1:
        return cells.reshape(layout.rows, layout.columns)
    is_planar = layout.is_planar and layout.transfer_syntax != _RLE
    if is_planar:
        return np.moveaxis(cells.reshape(layout.samples, layout.rows, layout.columns), 0, -1)
    return cells.reshape(layout.rows, layout.columns, layout.samples)


def _stored_values(layout: PixelLayout, cells: np.ndarray, name: str, warnings: list[str]) -> np.ndarray:
    """Extract the stored bits of each cell, with their sign (PS3.5 8.1.1)."""
    bits, shift = layout.bits_stored, layout.high_bit + 1 - layout.bits_stored
    top = 1 << (bits - 1)
    if layout.is_signed is None and bool((cells >> shift & top).any()):
        raise ImageError(
            f"{name}: PixelRepresentation is missing, and the values differ when read as signed and as unsigned",
            "dicom_unreadable",
        )
    signed = bool(layout.is_signed)
    if bits == layout.bits_allocated:
        return cells.view(f"i{cells.dtype.itemsize}") if signed and bits > 1 else cells
    values = cells >> shift & ((1 << bits) - 1)
    if not signed:
        if layout.high_bit + 1 < layout.bits_allocated and bool((cells >> (layout.high_bit + 1)).any()):
            warnings.append(f"bits above bit {layout.high_bit} hold other data and are ignored, as the standard says")
        return values
    return (values.astype(f"i{2 * cells.dtype.itemsize}") ^ top) - top


def _codec_values(dicom: DicomImage, data: bytes, frame: int, warnings: list[str]) -> np.ndarray:
    """Decode a JPEG, JPEG-LS, JPEG 2000 or HTJ2K frame with pydicom's decoders."""
    from pydicom.pixels import get_decoder

    layout, offsets = dicom.layout, _extended_offsets(dicom.dataset)
    header = codestream_header(_encoded_frame(dicom, data, frame))
    if header is not None and header[:2] != (layout.columns, layout.rows):
        raise ImageError(
            f"{dicom.name}: frame {frame} is {header[0]} x {header[1]} inside, the DICOM header says "
            f"{layout.columns} x {layout.rows}",
            "dicom_unreadable",
        )
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": layout.num_frames,
        "samples_per_pixel": layout.samples,
        "photometric_interpretation": layout.photometric,
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "pixel_representation": int(bool(layout.is_signed)),
        "planar_configuration": 0,
        "pixel_keyword": "PixelData",
    }
    if offsets:
        options["extended_offsets"] = offsets
    try:
        values, _ = get_decoder(layout.transfer_syntax).as_array(
            data,
            index=frame,
            **options,
        )
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        text = " ".join(str(error).split())
        raise ImageError(f"{dicom.name}: frame {frame} cannot be decoded ({text[:300]})", "image_unreadable") from error
    if values.shape[:2] != (layout.rows, layout.columns):
        raise ImageError(
            f"{dicom.name}: decodes to {values.shape}, the header says {layout.rows} x {layout.columns}",
            "dicom_unreadable",
        )
    precision = header[2] if header is not None else layout.bits_stored
    if layout.is_signed is None and bool((values >> (precision - 1) & 1).any()):
        raise ImageError(
            f"{dicom.name}: PixelRepresentation is missing, and the values differ when read as signed and as unsigned",
            "dicom_unreadable",
        )
    shift = layout.high_bit + 1 - layout.bits_stored
    return values >> shift if shift and precision > layout.bits_stored else values


def _extended_offsets(dataset: Any) -> tuple[bytes, bytes] | None:
    offsets, lengths = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    return (bytes(offsets), bytes(lengths)) if offsets and lengths else None


def _rgb_from_ybr(layout: PixelLayout, values: np.ndarray, name: str) -> np.ndarray:
    from pydicom.pixels import convert_color_space

    if layout.bits_allocated != 8:
        raise ImageError(
            f"{name}: {layout.photometric} with {layout.bits_allocated} bits is not supported", "dicom_unsupported"
        )
    return convert_color_space(values.copy(), "YBR_FULL", "RGB")
