"""Group the files of a study into series, and sort each series. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from babydoctor.imaging.series.facts import SliceFacts, Vector
from babydoctor.imaging.series.labels import series_label

Order = Literal["position", "number", "planes", "file"]
"""What a series is sorted by: position along the normal, InstanceNumber, InstanceNumber because the images lie in
several planes, or the order in which the files came."""

_SAME_MM = 1e-3
_GAP = 1.5
"""A distance between neighbors of this many times the usual one counts as a gap."""


@dataclass(frozen=True)
class SliceGroup:
    """A series that can be scrolled through.

    Attributes:
        slices: index of each image's file, in order.
        order: what they are sorted by. The frames of a multi-frame file keep the file's order.
        normal: direction in which the images follow each other: head to feet, front to back, or right to left for the
            planes nearest to these; None if the orientation is not known.
        centers: middle of each image, or of each frame of a multi-frame file, in mm; empty if one is not known.
        num_gaps: places where images seem to be missing.
        num_repeated: images at the same position as the previous image.
    """

    slices: tuple[int, ...]
    order: Order
    label: str
    normal: Vector | None = None
    centers: tuple[Vector, ...] = ()
    num_gaps: int = 0
    num_repeated: int = 0


def group_slices(facts: Sequence[SliceFacts]) -> list[SliceGroup]:
    """Group images by series and by what must agree to scroll through them: size, kind, orientation and echo.

    Each multi-frame file is a group of its own. Images of a series that match no other, such as localizers in three
    planes, form one group. Groups come in the order of their first file.
    """
    groups: list[list[int]] = []
    for index, one in enumerate(facts):
        fitting = next((group for group in groups if _belong_together(facts[group[0]], one)), None)
        if fitting is None:
            groups.append([index])
        else:
            fitting.append(index)
    groups = _join_singles(groups, facts)
    echoes = {(facts[group[0]].series, facts[group[0]].echo) for group in groups}
    several = {series for series, _ in echoes if sum(series == other for other, _ in echoes) > 1}
    return [_sorted(group, facts, with_echo=facts[group[0]].series in several) for group in groups]


def normal_of(facts: SliceFacts) -> Vector | None:
    """The unit vector along which images of this orientation follow each other, see ``SliceGroup``."""
    if facts.rows_direction is None or facts.columns_direction is None:
        return None
    (a, b, c), (d, e, f) = facts.rows_direction, facts.columns_direction
    cross = (b * f - c * e, c * d - a * f, a * e - b * d)
    main = max(range(3), key=lambda axis: abs(cross[axis]))
    # Patient coordinates point to the left, to the back and to the head (PS3.3 C.7.6.2.1.1).
    wanted = -1 if main == 2 else 1
    sign = 1 if cross[main] * wanted > 0 else -1
    x, y, z = (sign * value for value in cross)
    return x, y, z


def _belong_together(one: SliceFacts, other: SliceFacts) -> bool:
    if one.kind == "dicom" and (not one.series or one.frames > 1 or other.frames > 1):
        return False
    same = ("kind", "patient", "study", "series", "rows", "columns", "is_gray", "modality", "echo")
    if any(getattr(one, name) != getattr(other, name) for name in same):
        return False
    return all(
        (mine is None) == (theirs is None) and (mine is None or theirs is None or _dot(mine, theirs) > 0.999)
        for mine, theirs in (
            (one.rows_direction, other.rows_direction),
            (one.columns_direction, other.columns_direction),
        )
    )


def _join_singles(groups: Sequence[list[int]], facts: Sequence[SliceFacts]) -> list[list[int]]:
    """Put images of one series that are alone only because of their orientation into one group."""
    joined: list[list[int]] = []
    for group in groups:
        one = facts[group[0]]
        other = next((known for known in joined if _differ_in_plane(facts, known, group)), None)
        if len(group) > 1 or one.frames > 1 or not one.series or other is None:
            joined.append(group)
        else:
            other.extend(group)
    return joined


def _differ_in_plane(facts: Sequence[SliceFacts], known: Sequence[int], group: Sequence[int]) -> bool:
    one, other = (replace(facts[each[0]], rows_direction=None, columns_direction=None) for each in (known, group))
    is_mixed = len(known) == 1 or not all(_belong_together(facts[known[0]], facts[index]) for index in known)
    return is_mixed and _belong_together(one, other)


def _sorted(group: Sequence[int], facts: Sequence[SliceFacts], *, with_echo: bool) -> SliceGroup:
    first = facts[group[0]]
    is_mixed = not all(_belong_together(first, facts[index]) for index in group[1:])
    normal = None if is_mixed else normal_of(first)
    body_part = first.body_part if all(facts[index].body_part == first.body_part for index in group) else ""
    label = "pictures" if first.kind == "picture" and len(group) > 1 else "picture"
    if first.kind == "dicom":
        label = series_label(first.modality, normal, body_part, first.echo if with_echo else None)
        label += ", mixed planes" if is_mixed else ""
    if first.frames > 1 or len(group) == 1:
        return SliceGroup(tuple(group), "file", label, normal, first.centers)
    order = list(group)
    if normal is not None and all(facts[index].centers for index in group):

        def along(index: int) -> float:
            return _dot(normal, facts[index].centers[0])

        order.sort(key=lambda index: (round(along(index) / _SAME_MM), facts[index].number or 0, index))
        places = [along(index) for index in order]
        centers = tuple(facts[index].centers[0] for index in order)
        gaps, repeated = _gaps(places)
        return SliceGroup(tuple(order), "position", label, normal, centers, gaps, repeated)
    if all(facts[index].number is not None for index in group):
        order.sort(key=lambda index: (facts[index].number or 0, index))
        return SliceGroup(tuple(order), "planes" if is_mixed else "number", label, normal)
    return SliceGroup(tuple(order), "file", label, normal)


def _gaps(places: Sequence[float]) -> tuple[int, int]:
    """(gaps, repeated positions) of sorted positions in mm."""
    steps = [after - before for before, after in itertools.pairwise(places)]
    apart = sorted(step for step in steps if step > _SAME_MM)
    usual = apart[len(apart) // 2] if len(apart) > 1 else float("inf")
    return sum(step > _GAP * usual for step in apart), len(steps) - len(apart)


def _dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
