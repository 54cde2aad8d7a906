"""Which images of two series correspond when both are scrolled. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from babydoctor.serve.page.study.stack import Stack

LinkKind = Literal["position", "distance", "index", "none"]
"""How two series are linked:

- ``position``: both have positions in the same frame of reference.
- ``distance``: both have positions, but in different frames of reference, as in an examination on another day. They
  move by the same distance, measured from their positions at the time of linking.
- ``index``: at least one has no positions.
- ``none``: their planes differ.
"""

_PARALLEL = 0.9
"""Smallest cosine of the angle between two normals that count as parallel."""


@dataclass(frozen=True)
class Link:
    """``first`` and ``second`` are the images' positions along the common normal, in mm; empty without positions."""

    by: LinkKind
    first: tuple[float, ...] = ()
    second: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def link_stacks(first: Stack, second: Stack) -> Link:
    """How two series can be scrolled together."""
    one, other = first.group, second.group
    if one.normal is not None and other.normal is not None and abs(_dot(one.normal, other.normal)) < _PARALLEL:
        return Link("none")
    if one.normal is None or other.normal is None or not one.centers or not other.centers:
        return Link("index")
    is_one_space = first.facts.space and first.facts.space == second.facts.space
    own_normal = other.normal if is_one_space else one.normal
    return Link(
        "position" if is_one_space else "distance",
        tuple(round(_dot(center, own_normal), 3) for center in one.centers),
        tuple(round(_dot(center, other.normal), 3) for center in other.centers),
    )


def _dot(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
