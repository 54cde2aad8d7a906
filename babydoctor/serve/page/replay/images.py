"""The images of a session, found by their hashes and rendered again, or taken from the export."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from babydoctor.imaging.isolation import read_facts
from babydoctor.imaging.limits import ImageError
from babydoctor.imaging.series import hash_of
from babydoctor.progress import show_progress
from babydoctor.schema import UserError
from babydoctor.serve.page.replay.session_file import RecordedSession, RecordedView
from babydoctor.serve.page.scan import open_scan
from babydoctor.serve.page.study.archive import MAX_STUDY_BYTES, Archive, Refused, is_zip
from babydoctor.serve.page.study.stack import FILE_NAME
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.record import ViewRecord, pixel_hash

Status = Literal["same", "differs", "not_found", "from_export"]


@dataclass(frozen=True)
class ReplayedView:
    """An image to ask about.

    Attributes:
        png: None if there is none.
        status: ``same`` or ``differs``: the result of rendering again, compared with the recorded pixels.
            ``from_export``: the recorded pixels themselves. ``not_found``: no file has the recorded hash.
        note: one sentence about a difference or problem; empty if there is none.
    """

    png: bytes | None = field(repr=False)
    status: Status
    note: str = ""


def replay_views(session: RecordedSession, images: Path | None) -> list[ReplayedView]:
    """The images of a session, in order.

    Args:
        images: folder of the image files. None: use the images of the export.

    Raises:
        UserError: the folder does not exist.
    """
    if images is None:
        return [_from_export(view) for view in session.views]
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    found = _find([view.record for view in session.views], images)
    return [_render(view, data, is_exact) for view, (data, is_exact) in zip(session.views, found, strict=True)]


def render_record(data: bytes, record: ViewRecord) -> bytes:
    """Render the PNG of a view again from its file.

    Raises:
        PageError: the file cannot be read.
        UserError: the file lacks the frame or the window.
    """
    scan = open_scan(data)
    if not 0 <= record.frame < scan.num_frames:
        raise UserError(f"the file has no frame {record.frame + 1}; it has {scan.num_frames}")
    if record.preset is not None and record.preset not in scan.presets:
        raise UserError(f"the file has no window preset {record.preset!r}")
    scan.frame, scan.arrangement = record.frame, record.arrangement
    scan.preset, scan.center, scan.width = record.preset, record.center, record.width
    scan.text.boxes[record.frame] = list(record.hidden)
    return scan.view().png


def _from_export(view: RecordedView) -> ReplayedView:
    if view.png is None:
        return ReplayedView(None, "not_found", "The JSON holds no pixels: give --images, or replay the HTML file.")
    try:
        is_same = pixel_hash(view.png) == view.pixels
    except OSError:
        return ReplayedView(None, "not_found", "The image in the export is damaged.")
    if not is_same:
        return ReplayedView(view.png, "differs", "The image in the export was changed after it was exported.")
    return ReplayedView(view.png, "from_export")


def _render(view: RecordedView, data: bytes | None, is_exact: bool) -> ReplayedView:
    if data is None:
        return ReplayedView(None, "not_found", "No file in the folder is the recorded one.")
    try:
        png = render_record(data, view.record)
    except PageError as error:
        return ReplayedView(None, "not_found", error.sentence)
    except UserError as error:
        return ReplayedView(None, "not_found", f"The image cannot be rendered: {error}.")
    note = "" if is_exact else "The file was rewritten: it is the same DICOM instance with other bytes. "
    if pixel_hash(png) == view.pixels:
        return ReplayedView(png, "same", note.strip())
    return ReplayedView(png, "differs", f"{note}{_difference(view.png, png)}")


def _difference(before: bytes | None, after: bytes) -> str:
    if before is None:
        return "The pixels differ from the recorded ones."
    one, other = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int16) for png in (before, after))
    if one.shape != other.shape:
        return f"The size differs: {other.shape[1]} x {other.shape[0]} instead of {one.shape[1]} x {one.shape[0]}."
    apart = np.abs(one - other).max(axis=2)
    return f"{np.count_nonzero(apart) / apart.size:.1%} of the pixels differ, by at most {apart.max()} of 255."


def _find(records: Sequence[ViewRecord], folder: Path) -> list[tuple[bytes | None, bool]]:
    """For each record, the file with its hash, or else one with the same DICOM instance, and whether it is exact."""
    wanted = {record.file for record in records}
    instances = {record.instance for record in records if record.instance}
    by_file: dict[str, bytes] = {}
    by_instance: dict[str, bytes] = {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for data in _contents(show_progress(paths, "looking for the images", len(paths))):
        content = hash_of(data)
        if content in wanted:
            by_file[content] = data
        elif instances:
            try:
                instance = read_facts(data, name=FILE_NAME).instance
            except ImageError:
                continue  # not an image, so not the recorded file
            if instance in instances:
                by_instance[instance] = data
    return [
        (by_file[record.file], True) if record.file in by_file else (by_instance.get(record.instance), False)
        for record in records
    ]


def _contents(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        if path.stat().st_size > MAX_STUDY_BYTES:
            continue  # the web UI refuses files of this size
        data = path.read_bytes()
        if not is_zip(data):
            yield data
            continue
        try:
            members = list(Archive(data).files())
        except PageError:
            continue  # the web UI refuses this archive, too
        yield from (member for member in members if not isinstance(member, Refused))
