"""The plain records that flow through BabyDoctor, in the order in which data flows.

``data.parse_row -> Sample``, ``conversation.render -> Segment``, ``tokens.encode -> Example``,
``packing.pack -> Batch``. All records are frozen. This module does not import torch, so any module can import it.

Shapes: ``T`` tokens, ``N`` images, ``P`` patches per image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from babydoctor.errors import UserError as UserError

IGNORE_INDEX = -100
"""Label of a position that is not supervised (torch's cross-entropy default)."""

IMAGE_TOKEN = "<image>"
"""Stands for an image in text: in rows of data, in prompts and in requests."""

IMAGE_TOKEN_INDEX = -200
"""The id of an image in ``data preview --json``, as in the original LLaVA code."""

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. ``IMAGE_TOKEN`` in ``text`` stands for an image."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One validated row of data.

    ``image`` is a path relative to the image folder, ``embedded://SOURCE#ROW`` for an image that stays in its data
    set until it is read, the encoded bytes of an image, or None for a text-only row. ``source`` says where the row
    is (``file.json#12``), for messages. ``system`` replaces the template's system prompt; None keeps it.
    """

    id: str
    turns: tuple[Turn, ...]
    image: str | bytes | None = field(default=None, repr=False)
    source: str = ""
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of prompt text. ``supervised`` text is what the model learns to write.

    An image is a segment of its own whose text is exactly ``IMAGE_TOKEN`` and whose ``is_image`` is true.
    ``control`` marks text of the template: there ``</s>`` and other special tokens of the tokenizer are control
    tokens. In all other text, which users wrote, they are plain characters.
    """

    text: str
    supervised: bool = False
    is_image: bool = False
    control: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One encoded conversation; all three arrays have shape ``[T]``.

    ``input_ids`` int32; image slots hold 0 there and True in ``image_mask``. ``labels`` int32, aligned with
    ``input_ids`` (not shifted), ``IGNORE_INDEX`` where not supervised. ``num_cut`` counts text tokens that
    truncation removed.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    image_mask: np.ndarray
    images: tuple[str | bytes, ...] = field(default=(), repr=False)
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens that carry a loss. The first token never does, because nothing predicts it."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch: whole documents laid end to end, all arrays of shape ``[T]``.

    ``targets`` are the labels already shifted by one inside each document: position ``t`` predicts
    ``targets[t]``. ``position_ids`` count from 0 in each document. The first ``prefix_length`` tokens are the
    beginning of every document, stored once; ``document_lengths`` are the lengths of the rest of each document and sum
    to ``T - prefix_length``. ``images`` holds the ``N`` image references in the order of their slots;
    ``image_mask`` marks the ``N * P`` image slots.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    image_mask: np.ndarray
    document_lengths: tuple[int, ...]
    ids: tuple[str, ...]
    images: tuple[str | bytes, ...] = field(default=(), repr=False)
    prefix_length: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return int((self.targets != IGNORE_INDEX).sum())
