"""Studies as files: pydicom's small CT as slices of a series, shuffled, and as ZIP archives."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pydicom
from pydicom.examples import get_path

from helpers.web_ui import PATIENT

AXIAL = [1, 0, 0, 0, 1, 0]


def ct_slice(place: int, series: str = "1", **changes: Any) -> bytes:
    """An axial slice of 128 x 128 pixels at ``place`` mm. Its gray levels differ from those of other places.

    A change to None leaves the attribute out.
    """
    dataset = pydicom.dcmread(get_path("ct"))
    values = dataset.pixel_array + np.int16(20 * place)
    attributes = {
        "PatientName": PATIENT,
        "SeriesDescription": f"series of {PATIENT}",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": f"1.2.3.{series}",
        "SOPInstanceUID": f"1.2.3.{series}.{place + 1000}",
        "FrameOfReferenceUID": "1.2.9",
        "ImageOrientationPatient": AXIAL,
        "ImagePositionPatient": [-40, -40, place],
        "InstanceNumber": 100 + place,
        "BodyPartExamined": "CHEST",
        "PixelData": values.astype(np.int16).tobytes(),
        "WindowCenter": 100,
        "WindowWidth": 900,
    } | changes
    for keyword, value in attributes.items():
        if value is not None:
            setattr(dataset, keyword, value)
        elif keyword in dataset:
            delattr(dataset, keyword)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes] | Iterable[bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A ZIP archive; files without names are numbered."""
    named = files if isinstance(files, Mapping) else {f"IM{i:04}": file for i, file in enumerate(files)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in named.items():
            archive.writestr(name, data)
    return buffer.getvalue()
