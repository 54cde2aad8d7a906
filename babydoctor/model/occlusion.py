"""Occlusion sensitivity: which parts of the image an answer depends on ("Where it looked" in the web UI).

A window of the image is hidden and the answer's log-probability is computed again. Where it drops, the answer depended
on what was hidden. Windows overlap; a cell of the map has the mean drop of the windows that cover it.

Shapes: ``A`` answer tokens, ``D`` hidden size, ``P`` image slots, ``S`` image edge in pixels, ``V`` variants of the
image, ``T`` tokens of a prompt without its image.

Source: Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, pad

from babydoctor.data.layout import build_attention_layout
from babydoctor.model.babydoctor import BabyDoctor

Fill = Literal["blur", "mean"]
FILLS: tuple[Fill, ...] = ("blur", "mean")
FILL: Fill = "blur"
"""On phantoms, maps with a blurred fill find the finding more often than with the mean color; see the evaluation guide.
"""

WINDOW = 3
"""Edge of a window in cells; a cell is half a patch."""

MAX_FULL_PATCHES = 8
"""Patches along an edge up to which every window is tried. Larger images are searched coarsely first."""

COARSE_DIVISOR = 4
"""A coarse window is this part of the image's edge."""

OVERLAP = 2
"""Cells that neighboring coarse windows share, so that no spot lies at the edge of all windows that cover it."""

REFINED = 1
"""Coarse windows that are searched with fine ones.

For CLIP-L's 256 patches that makes 25 + 36 hidden windows. At 280 tokens each, a 7B model needs 0.23 PFLOP: 3.7 s on an
A10 at half of its peak (a plan, not a measurement).
"""

COARSE_WEIGHT = 0.9

BATCH_TOKENS = 4096
"""Tokens of one forward pass. It runs between two steps of running answers, so it should not take much longer."""


@dataclass(frozen=True, eq=False)
class OcclusionTask:
    """The input of a map.

    Attributes:
        input_ids: int64 ``[T + P]``, the prompt; image slots hold any id.
        first_slot: position of the first image slot; the slots are consecutive.
        pixels: float32 ``[3, S, S]``, normalized.
        answer_ids: int64 ``[A]``.
        patch_size: edge of a patch in pixels.
        fill: what is put in place of a hidden window.
    """

    input_ids: torch.Tensor
    first_slot: int
    pixels: torch.Tensor
    answer_ids: torch.Tensor
    patch_size: int
    fill: Fill = FILL


def build_task(
    model: BabyDoctor,
    input_ids: np.ndarray,
    image_mask: np.ndarray,
    pixels: np.ndarray,
    answer_ids: Sequence[int],
    fill: Fill = FILL,
) -> OcclusionTask:
    """A task from a tokenized prompt with one image.

    Args:
        input_ids: ``[T + P]``.
        image_mask: bool ``[T + P]``, true at the image slots.
        pixels: ``[3, S, S]``, normalized.
    """
    return OcclusionTask(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        first_slot=int(np.flatnonzero(image_mask)[0]),
        pixels=torch.from_numpy(np.asarray(pixels, np.float32)),
        answer_ids=torch.tensor(answer_ids, dtype=torch.long),
        patch_size=model.patch_size,
        fill=fill,
    )


@dataclass(frozen=True, slots=True)
class HiddenWindow:
    """A square of cells."""

    row: int
    column: int
    edge: int


class OcclusionMap:
    """Computes one map, batch by batch, so that other work can run in between and the map can be canceled.

    Args:
        model: in evaluation mode.
        task: prompt, image and answer.
    """

    def __init__(self, model: BabyDoctor, task: OcclusionTask) -> None:
        self.model, self.task = model, task
        self.num_cells = 2 * (task.pixels.shape[-1] // task.patch_size)
        self.drops: dict[HiddenWindow, np.ndarray] = {}
        """Drop of each answer token's log-probability ``[A]``, by hidden window."""
        self._filled = fill_image(task.pixels, task.fill, task.patch_size)
        self._base: np.ndarray | None = None

    def run(self) -> Iterator[float]:
        """Do all work; yields the share that is done after each batch."""
        self._base = self._score([None])[0]
        windows = self._first_windows()
        num_all = len(windows) if self._is_full else len(windows) + self._num_refined
        yield 0.0
        for batch in self._batches(windows):
            yield self._hide(batch) / num_all
        if not self._is_full:
            for batch in self._batches(self._fine_windows()):
                yield min(1.0, self._hide(batch) / num_all)

    def result(self) -> np.ndarray:
        """Drop of each answer token's log-probability, float32 ``[A, cells, cells]``. Negative: hiding helped."""
        fine = self._mean([window for window in self.drops if window.edge == WINDOW])
        if self._is_full:
            return np.nan_to_num(fine)
        coarse = self._mean([window for window in self.drops if window.edge != WINDOW])
        # A coarse window hides more, so its drop is larger. Scaled like this, no part that was searched coarsely only
        # reaches the peak of the part that was searched finely.
        best = max(float(drop.sum()) for window, drop in self.drops.items() if window.edge != WINDOW)
        peak = float(np.nansum(fine, axis=0).max())
        scale = COARSE_WEIGHT * peak / best if best > 0 else 0.0
        return np.nan_to_num(np.where(np.isfinite(fine), fine, coarse * scale))

    @property
    def _is_full(self) -> bool:
        return self.num_cells <= 2 * MAX_FULL_PATCHES

    @property
    def _coarse_edge(self) -> int:
        return self.num_cells // COARSE_DIVISOR

    @property
    def _num_refined(self) -> int:
        return REFINED * (self._coarse_edge - WINDOW + 1) ** 2

    def _first_windows(self) -> list[HiddenWindow]:
        edge = WINDOW if self._is_full else self._coarse_edge
        stride = 1 if self._is_full else edge - OVERLAP
        starts = [*range(0, self.num_cells - edge, stride), self.num_cells - edge]
        return [HiddenWindow(row, column, edge) for row in starts for column in starts]

    def _fine_windows(self) -> list[HiddenWindow]:
        """Windows inside the coarse ones that mattered most."""
        ranked = sorted(self.drops, key=lambda window: float(self.drops[window].sum()), reverse=True)
        fine = {
            HiddenWindow(coarse.row + row, coarse.column + column, WINDOW): None
            for coarse in ranked[:REFINED]
            for row in range(coarse.edge - WINDOW + 1)
            for column in range(coarse.edge - WINDOW + 1)
        }
        return list(fine)

    def _batches(self, windows: list[HiddenWindow]) -> Iterator[list[HiddenWindow]]:
        size = max(1, BATCH_TOKENS // (len(self.task.input_ids) + len(self.task.answer_ids)))
        for start in range(0, len(windows), size):
            yield windows[start : start + size]

    def _hide(self, windows: list[HiddenWindow]) -> int:
        """Score the image with each window hidden. Returns the number of windows scored so far."""
        assert self._base is not None
        for window, scores in zip(windows, self._score(list(windows)), strict=True):
            self.drops[window] = self._base - scores
        return len(self.drops)

    def _mean(self, windows: list[HiddenWindow]) -> np.ndarray:
        """Mean drop of the windows that cover each cell, ``[A, cells, cells]``; NaN where none does."""
        total = np.zeros((len(self.task.answer_ids), self.num_cells, self.num_cells), np.float32)
        count = np.zeros((self.num_cells, self.num_cells), np.float32)
        for window in windows:
            rows = slice(window.row, window.row + window.edge)
            columns = slice(window.column, window.column + window.edge)
            total[:, rows, columns] += self.drops[window][:, None, None]
            count[rows, columns] += 1
        with np.errstate(invalid="ignore"):
            return total / count

    @torch.inference_mode()
    def _score(self, windows: list[HiddenWindow | None]) -> np.ndarray:
        """Log-probability of each answer token with each window hidden (None: nothing), float32 ``[V, A]``.

        The text before the image is the same in all variants, so it is computed once.
        """
        model, task = self.model, self.task
        device, num_answer = model.device, len(task.answer_ids)
        images = torch.stack([self._hidden(window) for window in windows]).to(device)
        features = model.encode_images(images)  # [V, P, D]
        embed_tokens = model.language_model.model.embed_tokens
        prefix = task.first_slot
        after = torch.cat([task.input_ids[prefix + model.num_patches :], task.answer_ids[:-1]]).to(device)
        before = embed_tokens(task.input_ids[:prefix].to(device))
        behind = embed_tokens(after).expand(len(windows), -1, -1)
        documents = torch.cat([features.to(before.dtype), behind], dim=1)  # [V, L, D]
        length = documents.shape[1]
        embeds = torch.cat([before, documents.flatten(0, 1)])
        positions = torch.arange(prefix, prefix + length, device=device).repeat(len(windows))
        positions = torch.cat([torch.arange(prefix, device=device), positions])
        lengths, tails = [length] * len(windows), [num_answer] * len(windows)
        layout = build_attention_layout(lengths, None, prefix, device=device)
        tail_layout = build_attention_layout(lengths, tails, prefix, device=device)
        ends = prefix + length * torch.arange(1, len(windows) + 1, device=device)
        tail = (ends[:, None] + torch.arange(-num_answer, 0, device=device)).flatten()  # [V * A]
        hidden = model.decode(embeds[None], positions[None], layout, (tail, tail_layout))[0]
        logits = model.language_model.lm_head(hidden).float().unflatten(0, (len(windows), num_answer))
        scores = logits.log_softmax(-1).gather(2, task.answer_ids.to(device).expand(len(windows), -1)[..., None])
        return scores[..., 0].cpu().numpy()

    def _hidden(self, window: HiddenWindow | None) -> torch.Tensor:
        """The pixels with a window hidden, ``[3, S, S]``."""
        if window is None:
            return self.task.pixels
        pixels = self.task.pixels.clone()
        cell = self.task.patch_size / 2
        top, left = (math.floor(cell * start) for start in (window.row, window.column))
        bottom, right = (math.ceil(cell * (start + window.edge)) for start in (window.row, window.column))
        pixels[:, top:bottom, left:right] = self._filled[:, top:bottom, left:right]
        return pixels


def fill_image(pixels: torch.Tensor, fill: Fill, patch_size: int) -> torch.Tensor:
    """What hidden windows are filled with, ``[3, S, S]``: a blurred image, in which no finding can be made out, or the
    image's mean color."""
    if fill == "mean":
        return pixels.mean(dim=(1, 2), keepdim=True).expand_as(pixels)
    # Averages over four patches, three times: close to a Gaussian of two patches. Rows and columns are averaged one
    # after the other, which is the same as averaging squares and takes 1% of the time.
    edge = 4 * patch_size + 1
    blurred = pixels[None]
    for _ in range(3):
        blurred = pad(blurred, [edge // 2] * 4, mode="replicate")
        blurred = avg_pool2d(avg_pool2d(blurred, (edge, 1), stride=1), (1, edge), stride=1)
    return blurred[0]
