"""The images of one series, in memory. An image is parsed when it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from babydoctor.imaging.dicom import DicomImage, read_dicom
from babydoctor.imaging.isolation import load_image
from babydoctor.imaging.series import SliceFacts, SliceGroup, hash_of

FILE_NAME = "the file"
"""Name of every file in error messages, because the real name may identify a person."""


@dataclass(frozen=True)
class StackFile:
    """A file and its facts from ``isolation.read_facts``."""

    data: bytes = field(repr=False)
    facts: SliceFacts = field(repr=False)

    @property
    def sha256(self) -> str:
        return hash_of(self.data)


class Stack:
    """The images of a series in order: one for each file, or the frames of a multi-frame file.

    Args:
        files: files in order, all of one size and kind.
        group: how the files were grouped and sorted.
    """

    def __init__(self, files: Sequence[StackFile], group: SliceGroup) -> None:
        self.files = tuple(files)
        self.group = group
        self._opened: tuple[int, DicomImage] | None = None

    @property
    def facts(self) -> SliceFacts:
        """Facts of the first file."""
        return self.files[0].facts

    @property
    def is_multi_frame(self) -> bool:
        return len(self.files) == 1 and self.facts.frames > 1

    @property
    def noun(self) -> str:
        return "frame" if self.is_multi_frame else "image"

    @property
    def num_bytes(self) -> int:
        return sum(len(file.data) for file in self.files)

    def __len__(self) -> int:
        return self.facts.frames if self.is_multi_frame else len(self.files)

    def file(self, image: int) -> tuple[StackFile, int]:
        """The file of an image, and its frame in that file."""
        return (self.files[0], image) if self.is_multi_frame else (self.files[image], 0)

    def dicom(self, image: int) -> tuple[DicomImage, int]:
        """The parsed file of an image, and its frame in that file. The last parsed file is cached.

        Raises:
            ImageError: the file cannot be parsed.
        """
        file, frame = self.file(image)
        index = 0 if self.is_multi_frame else image
        opened = self._opened  # read it once, because another thread may replace it
        if opened is None or opened[0] != index:
            opened = self._opened = (index, read_dicom(file.data, name=FILE_NAME))
        return opened[1], frame

    def picture(self, image: int) -> Image.Image:
        """An image that is not a DICOM file.

        Raises:
            ImageError: the image cannot be decoded.
        """
        return load_image(self.file(image)[0].data, name=FILE_NAME)
