"""Segments -> token ids, labels and image mask. The only place that tokenizes.

Text between two images is tokenized as a whole, because SentencePiece vocabularies give other ids at the borders of
separately encoded pieces. A token is supervised if its last character is in a supervised segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from babydoctor.data.text_tokenizer import encode_text
from babydoctor.hub import describe, model_directory
from babydoctor.schema import IGNORE_INDEX, Example, Segment, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_SUPERVISED = 16
"""Truncation leaves at least this many tokens of the first reply (or all of it, if it is shorter)."""

CUE_TOKENS = 8
"""Truncation leaves this many tokens before the first reply: the template's marker of the model's turn."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model from a directory or the hub.

    Raises:
        UserError: it is not there, or it is not a fast tokenizer (labels need character offsets).
    """
    from transformers import AutoTokenizer

    directory = model_directory(path, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {str(path)!r} ({describe(error)}); give a directory with "
            "tokenizer.json or tokenizer.model, or the id of a model on the hub"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {str(path)!r} gives no character offsets; convert it to tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {str(path)!r} has no eos_token; name one in tokenizer_config.json")
    return tokenizer


def encode(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    num_patches: int,
    *,
    max_length: int | None = None,
    id: str = "",
    images: Sequence[str | bytes] = (),
) -> Example:
    """Encode one conversation. Each image takes ``num_patches`` tokens, so the length is final.

    Args:
        max_length: longest example in tokens. Longer ones lose text, see ``truncate``.

    Raises:
        UserError: more or fewer images than image segments, or the images alone do not fit.
    """
    num_slots = sum(segment.is_image for segment in segments)
    if images and len(images) != num_slots:
        raise UserError(f"sample {id!r} has {len(images)} image(s) but {num_slots} place(s) for one in its text")
    ids: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    supervised: list[bool] = [False] * len(ids)
    is_image: list[bool] = [False] * len(ids)
    for run in _text_runs(segments):
        if run is None:
            ids += [0] * num_patches
            supervised += [False] * num_patches
            is_image += [True] * num_patches
            continue
        run_ids, owner = encode_text(run, tokenizer)
        ids += run_ids
        supervised += [run[index].supervised for index in owner]
        is_image += [False] * len(run_ids)
    input_ids = np.array(ids, dtype=np.int32)
    labels = np.where(np.array(supervised, dtype=bool), input_ids, np.int32(IGNORE_INDEX)).astype(np.int32)
    example = Example(id, input_ids, labels, np.array(is_image, dtype=bool), tuple(images))
    return example if max_length is None or len(example) <= max_length else truncate(example, max_length)


def truncate(example: Example, max_length: int) -> Example:
    """Cut text until the example has ``max_length`` tokens. Image slots always stay.

    Text is cut in this order: from the end of the conversation backwards, until only the start of the first reply is
    left; then the question, from its end backwards; then the system prompt.

    Raises:
        UserError: the images and a supervised token do not fit into ``max_length``.
    """
    num_cut = len(example) - max_length
    assert num_cut > 0, (len(example), max_length)
    is_text = ~example.image_mask
    supervised = np.flatnonzero(example.labels != IGNORE_INDEX)
    if len(supervised):
        first = int(supervised[0])
        reply_end = first + int(np.argmin(np.append(example.labels[first:] != IGNORE_INDEX, False)))
        keep_until = min(first + MIN_SUPERVISED, reply_end)
    else:
        first = keep_until = len(example)
    tail = np.arange(len(example) - 1, keep_until - 1, -1)
    question = np.arange(first - 1 - CUE_TOKENS, 0, -1)
    order = np.concatenate([tail, question])
    order = order[is_text[order]]
    if num_cut > len(order):
        raise UserError(
            f"sample {example.id!r} cannot be cut to {max_length} tokens: {int(example.image_mask.sum())} of its "
            f"{len(example)} tokens are image slots, which stay; raise data.max_length"
        )
    keep = np.ones(len(example), dtype=bool)
    keep[order[:num_cut]] = False
    return Example(
        example.id,
        example.input_ids[keep],
        example.labels[keep],
        example.image_mask[keep],
        example.images,
        num_cut=num_cut,
    )


def _text_runs(segments: Sequence[Segment]) -> list[list[Segment] | None]:
    """Group adjacent text segments; None stands for an image."""
    runs: list[list[Segment] | None] = []
    for segment in segments:
        if segment.is_image:
            runs.append(None)
        elif runs and runs[-1] is not None:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs
