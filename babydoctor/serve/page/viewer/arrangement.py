"""What the viewer does to a windowed image for the model: crop, invert, mirror, rotate. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageOps

Region = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the file. Right and bottom are exclusive."""

_TURNS = {1: Image.Transpose.ROTATE_270, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_90}


@dataclass(frozen=True)
class Arrangement:
    """How an image is shown.

    ``quarter_turns`` counts rotations by 90 degrees clockwise, 0 to 3. The image is mirrored left to right first.
    """

    is_inverted: bool = False
    is_mirrored: bool = False
    quarter_turns: int = 0
    region: Region | None = None

    def apply(self, picture: Image.Image, columns: int, rows: int) -> Image.Image:
        """The image as shown.

        Args:
            picture: one pixel for each pixel of the file, or resampled to square pixels.
        """
        if self.region is not None:
            x, y = picture.width / columns, picture.height / rows
            left, top, right, bottom = self.region
            picture = picture.crop((round(left * x), round(top * y), round(right * x), round(bottom * y)))
        if self.is_inverted:
            picture = ImageOps.invert(picture)
        if self.is_mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture.transpose(_TURNS[self.quarter_turns]) if self.quarter_turns else picture

    @property
    def caption(self) -> str:
        """The changes, for the line under the image; empty if there are none."""
        parts = []
        if self.region is not None:
            left, top, right, bottom = self.region
            parts.append(f"region of {right - left} × {bottom - top} pixels from column {left + 1}, row {top + 1}")
        parts += ["inverted"] if self.is_inverted else []
        parts += ["flipped left to right"] if self.is_mirrored else []
        parts += [f"rotated {90 * self.quarter_turns}° clockwise"] if self.quarter_turns else []
        return ", ".join(parts)
