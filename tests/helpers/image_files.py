"""Build image files byte by byte: DICOM with any header, PNG with any chunks, TIFF with any tags. Also damage them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

BIG_ENDIAN, LITTLE_ENDIAN = str(ExplicitVRBigEndian), str(ExplicitVRLittleEndian)
IMPLICIT = "1.2.840.10008.1.2"


def dicom_dataset(pixels: np.ndarray, **attributes: Any) -> Dataset:
    """An image object with the given stored values, ``[rows, columns]`` or ``[rows, columns, 3]``.

    An attribute of None is left out, and a ``(VR, value)`` tuple sets an element with that VR.
    """
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CT", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    if pixels.ndim == 3:
        dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.PlanarConfiguration = "RGB", 3, 0
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.dtype.kind == "f":
        del dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
        dataset.FloatPixelData = pixels.tobytes()
    else:
        dataset.add_new("PixelData", "OW" if pixels.dtype.itemsize > 1 else "OB", pixels.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid values are intended
        for keyword, value in attributes.items():
            if value is None:
                delattr(dataset, keyword)
            elif isinstance(value, tuple):
                dataset.add_new(keyword, *value)
            else:
                setattr(dataset, keyword, value)
    return dataset


def dicom_bytes(dataset: Dataset, syntax: str = LITTLE_ENDIAN, *, has_meta: bool = True) -> bytes:
    """The data set as a file, or as the bare data set. Words of pixel data are swapped for big endian."""
    is_big, is_implicit = syntax == BIG_ENDIAN, syntax == IMPLICIT
    if is_big and dataset.BitsAllocated > 8:
        kind = f"u{dataset.BitsAllocated // 8}"
        dataset["PixelData"].value = np.frombuffer(dataset.PixelData, f"<{kind}").astype(f">{kind}").tobytes()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if has_meta:
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            # Private transfer syntaxes do not say how they are written.
            how = {"implicit_vr": False, "little_endian": True} if UID(syntax).is_private else {}
            dataset.save_as(file, enforce_file_format=True, **how)
        else:
            dcmwrite(file, dataset, implicit_vr=is_implicit, little_endian=not is_big)
    return file.getvalue()


def dicom(pixels: np.ndarray, syntax: str = LITTLE_ENDIAN, **attributes: Any) -> bytes:
    """A DICOM file; see ``dicom_dataset``."""
    return dicom_bytes(dicom_dataset(pixels, **attributes), syntax)


def item(**attributes: Any) -> Dataset:
    """A sequence item; ``(VR, value)`` tuples set elements with that VR."""
    dataset = Dataset()
    for keyword, value in attributes.items():
        if isinstance(value, tuple):
            dataset.add_new(keyword, *value)
        else:
            setattr(dataset, keyword, value)
    return dataset


def encapsulated(frames: Sequence[bytes], syntax: str, *, has_delimiter: bool = True, **attributes: Any) -> bytes:
    """A compressed DICOM file of the given codestreams; the attributes must describe them."""
    dataset = dicom_dataset(np.zeros((1, 1), np.uint8), **attributes)
    items = b"\xfe\xff\x00\xe0\0\0\0\0"
    for frame in frames:
        even = frame + b"\0" * (len(frame) % 2)
        items += b"\xfe\xff\x00\xe0" + struct.pack("<I", len(even)) + even
    dataset["PixelData"].value = items
    dataset["PixelData"].is_undefined_length = True
    data = dicom_bytes(dataset, syntax)
    return data if has_delimiter else data.removesuffix(b"\xfe\xff\xdd\xe0\0\0\0\0")


def png_chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    """One chunk; ``crc`` replaces the correct checksum."""
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if crc is None else crc)
    )


def png(samples: np.ndarray, color_type: int, depth: int, *extra: bytes) -> bytes:
    """A PNG of samples ``[h, w]`` or ``[h, w, channels]`` with 8 or 16 bits; ``extra`` chunks come before the data."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2" if depth == 16 else "u1").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(raw)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(samples: np.ndarray, photometric: int, *extra: tuple[int, int, int], order: str = "<") -> bytes:
    """An uncompressed TIFF of samples ``[h, w]`` or ``[h, w, channels]``; ``extra`` are (tag, type, value)."""
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits, kind = samples.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries = [(256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8)]
    entries += [(277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(data)), (339, 3, 1, kind)]
    entries += [(tag, type_, 1, value) for tag, type_, value in extra]
    bits_at = 8 + len(data) + len(data) % 2
    entries.append((258, 3, channels, bits if channels == 1 else bits_at))
    body = data + b"\0" * (len(data) % 2) + struct.pack(f"{order}{channels}H", *[bits] * channels)
    directory_at = 8 + len(body) + len(body) % 2
    body += b"\0" * (len(body) % 2) + struct.pack(f"{order}H", len(entries))
    for tag, type_, count, value in sorted(entries):
        inline = struct.pack(f"{order}HH", value, 0) if type_ == 3 and count == 1 else struct.pack(f"{order}I", value)
        body += struct.pack(f"{order}HHI", tag, type_, count) + inline
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory_at)
    return header + body + b"\0\0\0\0"


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, set, cut, repeat or insert, mostly near the beginning, where headers are."""
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.4 else min(len(data), 2000)
    for _ in range(int(rng.choice([1, 2, 5, 20]))):
        place = int(rng.integers(0, reach))
        kind = rng.integers(0, 7)
        if kind <= 2:
            changed[place : place + 1] = bytes([int(rng.integers(256))])
        elif kind == 3:
            changed[place : place + 1] = bytes([(changed[place : place + 1] or b"\0")[0] ^ 1 << int(rng.integers(8))])
        elif kind == 4:
            changed[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif kind == 5 and rng.random() < 0.3:
            del changed[place:]
        else:
            changed[place:place] = changed[max(0, place - 16) : place]
    return bytes(changed)


def plain_png(red: int) -> bytes:
    """A PNG of 5 x 4 pixels in one color."""
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()
