"""DICOM files: parse the header, decode a frame, and show it under a window as an RGB picture.

``file`` parses bytes, ``header`` decides how pixels are stored, ``pixels`` decodes a frame, ``gray`` applies a window
to a gray frame, ``values`` and ``lut`` read the attributes that these steps need, and ``render`` runs the steps in
order.

Free of torch. pydicom is imported where it is used, because importing it takes a third of a second.
"""

from babydoctor.imaging.dicom.file import is_dicom
from babydoctor.imaging.dicom.image import IDENTIFYING_TAGS, DicomImage, harmless_facts, identifying_tags
from babydoctor.imaging.dicom.render import read_dicom, render

__all__ = [
    "IDENTIFYING_TAGS",
    "DicomImage",
    "harmless_facts",
    "identifying_tags",
    "is_dicom",
    "read_dicom",
    "render",
]
