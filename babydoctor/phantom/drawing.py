"""Draw the grayscale image of a radiology phantom.

The drawings are schematic. Each of the four modalities shows a torso from the front with a caricature of its physics:
summed shadows for a radiograph, hard edges for CT, coil shading for MR, a speckled fan for ultrasound. A tiny vision
tower learns to read them in a minute, and a person can still recognize the finding.

**Left and right follow the radiological convention**: the viewer faces the patient, so the patient's left, with the
heart, is on the viewer's right.

Coordinates are those of ``shapes.py``; ``MM_PER_UNIT`` is the scale. Images are float arrays ``[S, S]`` in [0, 1]
until the last step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from babydoctor.phantom.case import Case
from babydoctor.phantom.shapes import (
    CANONICAL_SIZE,
    Grid,
    bar,
    blend,
    build_grid,
    ellipse,
    grain,
    smooth_noise,
    speckle,
)

MM_PER_UNIT = 180.0
"""The image is 2 units = 360 mm wide."""

VISIBLE_DIFFERENCE = 25
"""In gray levels of 255. Larger than noise, smaller than any finding's contrast."""

LEVEL_Y = {"upper": -0.42, "middle": -0.02, "lower": 0.38}


@dataclass(frozen=True)
class Torso:
    """One patient's build: the variation between cases that carries no meaning."""

    cx: float
    cy: float
    width: float
    lung_rx: float
    lung_ry: float
    lung_x: float
    tilt: float
    heart: float
    rib_phase: float
    rib_gap: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Torso:
        def near(value: float, spread: float) -> float:
            return float(value + spread * rng.uniform(-1, 1))

        return cls(
            cx=near(0, 0.04),
            cy=near(0, 0.04),
            width=near(0.9, 0.05),
            lung_rx=near(0.32, 0.02),
            lung_ry=near(0.68, 0.04),
            lung_x=near(0.43, 0.02),
            tilt=near(0.08, 0.03),
            heart=near(0.26, 0.04),
            rib_phase=near(0, 0.09),
            rib_gap=near(0.19, 0.015),
        )

    def lung(self, grid: Grid, sign: int, soft: float = 1.5) -> np.ndarray:
        """Mask of the lung on the viewer's left (-1) or right (+1), bounded below by a domed diaphragm."""
        mask = ellipse(
            grid, self.cx + sign * self.lung_x, self.cy, self.lung_rx, self.lung_ry, angle=-sign * self.tilt, soft=soft
        )
        # The dome over the liver (viewer's left) is higher than the other.
        top = self.cy + (0.56 if sign > 0 else 0.52)
        dome = top + 0.9 * (grid.x - self.cx - sign * self.lung_x) ** 2
        return mask * np.clip((dome - grid.y) / (soft * grid.pixel) + 0.5, 0, 1)

    def lungs(self, grid: Grid, soft: float = 1.5) -> np.ndarray:
        return np.maximum(self.lung(grid, -1, soft), self.lung(grid, 1, soft))

    def torso(self, grid: Grid, shrink: float = 0.0) -> np.ndarray:
        """Shoulders and flanks: a rounded box that widens slightly downward."""
        u = np.abs(grid.x - self.cx) / (self.width - shrink - 0.06 * np.cos(2.2 * grid.y))
        v = np.abs(grid.y - self.cy - 0.28) / (1.2 - shrink)
        distance = 1 - (u**4 + v**4) ** 0.25
        return np.clip(distance * 0.9 / (1.5 * grid.pixel) + 0.5, 0, 1)

    def ribs(self, grid: Grid, width: float) -> np.ndarray:
        """Rib shadows that slope down from the spine, ``[S, S]``."""
        height = grid.y - self.rib_phase - 0.55 * (grid.x - self.cx) ** 2
        distance = np.abs((height / self.rib_gap + 0.5) % 1 - 0.5) * self.rib_gap
        return np.clip((width / 2 - distance) / grid.pixel + 0.5, 0, 1)


@dataclass(frozen=True)
class Look:
    """Brightness (0 to 1) of the parts of a finding in one modality."""

    solid: float
    fluid: float
    wall: float
    hollow: float
    bone: float
    gap: float


LOOKS = {
    "radiograph": Look(solid=0.88, fluid=0.78, wall=0.86, hollow=0.04, bone=1.0, gap=0.05),
    "ct": Look(solid=0.78, fluid=0.62, wall=0.8, hollow=0.02, bone=1.0, gap=0.05),
    "mr": Look(solid=0.75, fluid=1.0, wall=0.8, hollow=0.0, bone=0.9, gap=0.05),
    "ultrasound": Look(solid=0.95, fluid=0.02, wall=0.95, hollow=0.0, bone=1.0, gap=0.05),
}


def _place(case: Case, body: Torso, rng: np.random.Generator) -> tuple[int, float, float, float]:
    """Location of the finding: sign of its side in the image, ``cx``, ``cy``, and its radius in units."""
    assert case.side and case.level and case.size_mm, case
    # Radiological convention: the patient's left is on the viewer's right.
    sign = 1 if case.side == "left" else -1
    cx = body.cx + sign * (body.lung_x + 0.06 * rng.uniform(-1, 1))
    cy = body.cy + LEVEL_Y[case.level] + 0.07 * rng.uniform(-1, 1)
    return sign, float(cx), float(cy), case.size_mm / 2 / MM_PER_UNIT


def paint_finding(image: np.ndarray, grid: Grid, case: Case, body: Torso) -> np.ndarray:
    """Paint the case's finding into the image ``[S, S]``. The image of a normal case is unchanged."""
    if case.finding == "none":
        return image
    # A separate random stream, so the rest of the image is the same with and without the finding.
    rng = np.random.default_rng([case.noise_seed, 1])
    look = LOOKS[case.modality]
    sign, cx, cy, radius = _place(case, body, rng)
    if case.finding == "nodule":
        mask = ellipse(grid, cx, cy, radius, radius * rng.uniform(0.85, 1.1), rng.uniform(0, 3), soft=2)
        return blend(image, mask, look.solid)
    if case.finding == "cyst":
        # Wide enough for the cavity to be visible at 84 px.
        outer = radius * 1.15 + 1.5 * grid.pixel
        image = blend(image, ellipse(grid, cx, cy, outer, outer), look.wall)
        inner = outer - 2.2 * grid.pixel
        image = blend(image, ellipse(grid, cx, cy, inner, inner), look.hollow)
        if case.modality == "ultrasound":  # posterior acoustic enhancement behind fluid
            image = blend(image, 0.5 * bar(grid, cx, cy + outer + 0.1, outer * 1.4, 0.2, 0), 0.9)
        return image
    if case.finding == "effusion":
        # A loculated collection: a lens against the chest wall that bulges inward.
        reach = body.lung_rx * np.sqrt(max(0.0, 1 - ((cy - body.cy) / body.lung_ry) ** 2))
        wall_x = body.cx + sign * (body.lung_x + reach)
        inside = np.clip(1.5 * ellipse(grid, body.cx + sign * body.lung_x, body.cy, 0.36, 0.74, soft=2), 0, 1)
        if case.modality == "ultrasound":
            rim = ellipse(grid, wall_x, cy, 0.17 + radius * 0.9, 0.19 + radius * 1.4, soft=1.5)
            image = blend(image, rim * inside, 0.75)
        lens = ellipse(grid, wall_x, cy, 0.13 + radius * 0.9, 0.14 + radius * 1.4, soft=1.5)
        return blend(image, lens * inside, look.fluid)
    assert case.finding == "fracture", case.finding
    return _paint_fracture(image, grid, cx, cy, radius, sign, look, case.modality, rng)


def _paint_fracture(
    image: np.ndarray,
    grid: Grid,
    cx: float,
    cy: float,
    radius: float,
    sign: int,
    look: Look,
    modality: str,
    rng: np.random.Generator,
) -> np.ndarray:
    """Two halves of a rib, displaced, with a dark gap between them."""
    angle = sign * rng.uniform(0.25, 0.5)
    length, width = 0.14 + radius * 1.1, 0.075
    gap, step = 0.05 + radius * 0.2, 0.05 + radius * 0.25
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    image = blend(image, bar(grid, cx, cy, 2 * length, 2.6 * width, angle, soft=2) * 0.8, look.gap)
    for half in (-1, 1):
        x, y = np.array([cx, cy]) + half * ((length + gap) / 2 * along + step / 2 * across)
        if modality == "ultrasound":  # acoustic shadow below each half
            shadow = bar(grid, x, y + 0.2, length, 0.36, 0, soft=3)
            image = blend(image, shadow * 0.7, 0.02)
        image = blend(image, bar(grid, x, y, length, width, angle), look.bone)
    return image


def _radiograph(grid: Grid, case: Case, body: Torso, rng: np.random.Generator) -> np.ndarray:
    """A frontal chest radiograph: shadows add up, so bones are visible through everything."""
    size = grid.size
    image = 0.03 + 0.6 * body.torso(grid)
    lungs = body.lungs(grid, soft=3)
    image = image - 0.42 * lungs
    image = image + 0.1 * body.ribs(grid, 0.05) * body.torso(grid, 0.06) * (grid.y < 0.6)
    heart = ellipse(grid, body.cx + 0.13, body.cy + 0.3, body.heart, 0.32, 0.5, soft=4)
    spine = np.clip(1.4 - np.abs(grid.x - body.cx) / 0.1, 0, 1)
    image = image + 0.24 * heart * lungs + 0.12 * spine * body.torso(grid)
    for sign in (-1, 1):  # clavicles, and vessels fanning out from the hilum
        image = image + 0.16 * bar(grid, body.cx + sign * 0.4, body.cy - 0.62, 0.6, 0.05, sign * -0.18)
        image = image + 0.12 * ellipse(grid, body.cx + sign * 0.2, body.cy - 0.02, 0.07, 0.2, sign * 0.4, soft=6)
    image = image + 0.03 * smooth_noise(rng, size, 9, 9)
    return paint_finding(image, grid, case, body) + 0.018 * grain(rng, size)


def _ct(grid: Grid, case: Case, body: Torso, rng: np.random.Generator) -> np.ndarray:
    """A coronal CT reformat in a soft window: sharp edges, white bone, black air."""
    size = grid.size
    image = blend(np.zeros((size, size), np.float32), body.torso(grid), 0.3)
    image = blend(image, body.torso(grid, 0.09), 0.52)
    liver = ellipse(grid, body.cx - 0.34, body.cy + 0.78, 0.5, 0.36, -0.2)
    image = blend(image, liver, 0.62)
    lungs = body.lungs(grid, soft=1)
    image = blend(image, lungs, 0.1)
    vessels = np.clip(smooth_noise(rng, size, 24, 24) - 1.2, 0, 1)
    image = image + 0.22 * vessels * lungs
    image = blend(image, ellipse(grid, body.cx + 0.12, body.cy + 0.3, body.heart, 0.3, 0.5), 0.6)
    # The vertebral column with its discs, and cross-sections of the ribs along the side walls.
    discs = np.abs(((grid.y - body.rib_phase) / 0.17 + 0.5) % 1 - 0.5) > 0.1
    column = np.clip((0.1 - np.abs(grid.x - body.cx)) / grid.pixel + 0.5, 0, 1) * body.torso(grid, 0.06)
    image = blend(image, column * np.where(discs, 1.0, 0.45), 0.93)
    edge = np.clip(1 - np.abs(np.abs(grid.x - body.cx) - body.lung_x - body.lung_rx - 0.03) / 0.045, 0, 1)
    beads = edge * body.ribs(grid, 0.09) * (np.abs(grid.y) < 0.6)
    image = blend(image, np.clip(1.5 * beads, 0, 1), 0.95)
    streaks = smooth_noise(rng, size, CANONICAL_SIZE // 2, 3)
    return paint_finding(image, grid, case, body) + 0.02 * streaks + 0.012 * grain(rng, size)


def _mr(grid: Grid, case: Case, body: Torso, rng: np.random.Generator) -> np.ndarray:
    """A coronal MR image: bright fat, dark cortical bone, coil shading, breathing ghosts."""
    size = grid.size
    image = blend(np.full((size, size), 0.02, np.float32), body.torso(grid), 0.95)
    image = blend(image, body.torso(grid, 0.1), 0.42)
    image = blend(image, ellipse(grid, body.cx - 0.34, body.cy + 0.78, 0.5, 0.36, -0.2, soft=2), 0.55)
    lungs = body.lungs(grid, soft=2)
    image = blend(image, lungs, 0.14)
    image = image * (1 - 0.5 * body.ribs(grid, 0.04) * (body.torso(grid, 0.08) - lungs).clip(0, 1) * (grid.y < 0.5))
    heart = ellipse(grid, body.cx + 0.12, body.cy + 0.3, body.heart, 0.3, 0.5, soft=2)
    chamber = ellipse(grid, body.cx + 0.14, body.cy + 0.32, body.heart * 0.55, 0.17, 0.5, soft=2)
    image = blend(blend(image, heart, 0.38), chamber, 0.08)
    discs = np.abs(((grid.y - body.rib_phase) / 0.17 + 0.5) % 1 - 0.5) > 0.12
    column = np.clip((0.09 - np.abs(grid.x - body.cx)) / (2 * grid.pixel) + 0.5, 0, 1) * body.torso(grid, 0.06)
    image = blend(image, column, np.where(discs, 0.7, 0.2).astype(np.float32))
    image = paint_finding(image, grid, case, body)
    shift = int(rng.integers(CANONICAL_SIZE // 6, CANONICAL_SIZE // 3)) * size // CANONICAL_SIZE
    ghost = 0.08 * np.roll(image, shift, axis=0)
    shading = 1 + 0.3 * (rng.uniform(-1, 1) * grid.x + rng.uniform(-1, 1) * grid.y)
    return (image + ghost) * shading + 0.02 * speckle(rng, size, CANONICAL_SIZE, CANONICAL_SIZE)


def _ultrasound(grid: Grid, case: Case, body: Torso, rng: np.random.Generator) -> np.ndarray:
    """A curved-array ultrasound image: a fan of speckle that fades with depth."""
    size = grid.size
    dx, dy = grid.x, grid.y + 1.75
    depth, angle = np.hypot(dx, dy), np.arctan2(dx, dy)
    fan = np.clip((0.62 - np.abs(angle)) / 0.02, 0, 1) * np.clip((depth - 0.86) / 0.03, 0, 1)
    fan = fan * np.clip((2.62 - depth) / 0.03, 0, 1)
    tissue = 0.38 + 0.1 * smooth_noise(rng, size, 7, 5)
    for _ in range(3):  # layers of fascia parallel to the probe
        layer_depth = rng.uniform(0.92, 2.5)
        tissue = tissue + 0.22 * np.exp(-(((depth - layer_depth) / 0.03) ** 2)) * np.clip(
            0.5 + smooth_noise(rng, size, 3, 6), 0, 1
        )
    tissue = tissue + 0.35 * np.exp(-(((depth - 0.9) / 0.05) ** 2))
    image = paint_finding(tissue, grid, case, body)
    # Speckle is multiplicative, and finer along the beam than across it.
    fine = speckle(rng, size, CANONICAL_SIZE, CANONICAL_SIZE // 2)
    image = image * (0.62 + 0.34 * fine) * np.clip(1.25 - 0.28 * (depth - 0.86), 0, 2)
    return image * fan


_DRAW = {"radiograph": _radiograph, "ct": _ct, "mr": _mr, "ultrasound": _ultrasound}


def finding_mask(case: Case, size: int) -> np.ndarray:
    """Where the finding is: bool ``[S, S]``, all false for a normal case.

    The rest of a drawing is the same with and without the finding, so the mask is true where the two differ visibly.
    """
    normal = replace(case, finding="none", side=None, level=None, size=None, size_mm=None)
    return np.abs(draw(case, size).astype(int) - draw(normal, size).astype(int)) > VISIBLE_DIFFERENCE


def draw(case: Case, size: int) -> np.ndarray:
    """Draw a case: uint8 ``[size, size]``. The same case always gives the same pixels.

    A case is the same picture at every size: shrunk to 84 px, a drawing of 512 px looks like one of 84 px.
    """
    rng = np.random.default_rng(case.noise_seed)
    grid = build_grid(size)
    body = Torso.draw(rng)
    image = _DRAW[case.modality](grid, case, body, rng)
    # Exposure differs between patients.
    image = image * rng.uniform(0.9, 1.1) + rng.uniform(-0.02, 0.02)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
