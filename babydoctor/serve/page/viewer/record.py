"""A record of how a view was made, in hashes and numbers, for rendering it again from the same file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from babydoctor.imaging.burned_in import TextBox
from babydoctor.serve.page.viewer.arrangement import Arrangement

_AS_LOADED = Arrangement()


@dataclass(frozen=True)
class ViewRecord:
    """The state of the viewer when a view was rendered.

    Attributes:
        file: SHA-256 of the file's content.
        instance, series: SHA-256 of SOPInstanceUID and SeriesInstanceUID; empty for a picture.
        frame: index of the frame in the file, from 0.
        preset, center, width: the chosen window; all None for the file's own.
        hidden: boxes of the hidden texts, in pixels of the image before rotation and cropping.
    """

    file: str = ""
    instance: str = ""
    series: str = ""
    frame: int = 0
    preset: str | None = None
    center: float | None = None
    width: float | None = None
    arrangement: Arrangement = _AS_LOADED
    hidden: tuple[TextBox, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, for the export. The hidden texts themselves are left out."""
        arrangement = self.arrangement
        return {
            "file": self.file,
            "instance": self.instance,
            "series": self.series,
            "frame": self.frame,
            "window": {"preset": self.preset, "center": self.center, "width": self.width},
            "inverted": arrangement.is_inverted,
            "mirrored": arrangement.is_mirrored,
            "quarter_turns": arrangement.quarter_turns,
            "region": list(arrangement.region) if arrangement.region else None,
            "hidden": [[box.left, box.top, box.right, box.bottom] for box in self.hidden],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ViewRecord:
        """The inverse of ``to_json``. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for any other input."""
        region = values["region"]
        window = values["window"]
        turns = int(values["quarter_turns"])
        if not 0 <= turns <= 3 or (region is not None and len(region) != 4):
            raise ValueError("quarter_turns or region")
        left, top, right, bottom = map(int, region) if region is not None else (0, 0, 0, 0)
        return cls(
            file=str(values["file"]),
            instance=str(values["instance"]),
            series=str(values["series"]),
            frame=int(values["frame"]),
            preset=None if window["preset"] is None else str(window["preset"]),
            center=None if window["center"] is None else float(window["center"]),
            width=None if window["width"] is None else float(window["width"]),
            arrangement=Arrangement(
                is_inverted=bool(values["inverted"]),
                is_mirrored=bool(values["mirrored"]),
                quarter_turns=turns,
                region=None if region is None else (left, top, right, bottom),
            ),
            hidden=tuple(
                TextBox(int(left), int(top), int(right), int(bottom), "unclear")
                for left, top, right, bottom in values["hidden"]
            ),
        )


def pixel_hash(png: bytes) -> str:
    """SHA-256 of an image's size and RGB values, independent of the PNG encoder."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()
