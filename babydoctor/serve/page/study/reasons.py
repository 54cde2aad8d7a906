"""Messages about files of a study that cannot be shown, and about the order of a series."""

from __future__ import annotations

from collections.abc import Mapping

from babydoctor.errors import UserErrorCode
from babydoctor.imaging.series import Order

UNREAD: Mapping[str, str] = {
    "no_image": "no image: neither DICOM nor PNG, JPEG, TIFF, WebP, BMP or GIF",
    "dicom_without_image": "DICOM without an image, such as a report, a plan or a presentation state",
    "unsupported": "an unsupported kind of DICOM",
    "damaged": "damaged",
    "empty": "empty (0 bytes)",
    "too_large": "too large",
    "timeout": "takes too long to read and may be damaged",
    "nested_archive": "an archive inside; unpack it first",
    "encrypted": "protected by a password",
    "zip_method": "compressed with an unsupported method; create the archive again as an ordinary ZIP",
    "copy": "an exact copy of another image",
    "not_sent": "listed in the DICOMDIR, but not among the files",
    "not_fetched": "in the PACS, but not sent by it",
}
"""Code -> why a file is not shown."""

CODES: Mapping[UserErrorCode, str] = {
    "image_empty": "empty",
    "image_unreadable": "no_image",
    "image_too_large": "too_large",
    "image_bad_shape": "unsupported",
    "dicom_unreadable": "damaged",
    "dicom_unsupported": "unsupported",
    "dicom_without_image": "dicom_without_image",
    "dicom_without_decoder": "unsupported",
    "image_decode_failed": "damaged",
    "image_decode_timeout": "timeout",
    "image_decoder_down": "damaged",
}
"""Code of ``ImageError`` -> code of ``UNREAD``."""

ORDERS: Mapping[Order, str] = {
    "position": "sorted by position",
    "number": "sorted by image number, because positions are missing",
    "planes": "sorted by image number, because the images lie in several planes",
    "file": "in the order of the files, because positions and image numbers are missing",
}
