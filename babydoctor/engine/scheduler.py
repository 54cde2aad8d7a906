"""Choose the sequences of a step, and advance their state after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class StepWork:
    """The work of one step.

    Attributes:
        decoding: sequences that get one more token each, sorted by slot.
        rows: inputs of the decoding sequences.
        prefilling: sequences that compute a piece of their prompt.
        chunks: those pieces, aligned with ``prefilling``.
    """

    decoding: list[Sequence]
    rows: DecodeRows
    prefilling: list[Sequence]
    chunks: list[Chunk]

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decoding, *self.prefilling]


def plan_batch(running: Iterable[Sequence], max_rows: int) -> StepWork:
    """Take all decoding sequences, and fill the remaining rows with pieces of prompts in order of arrival.

    At least one row goes to a prompt, so prompts make progress even if ``max_rows`` sequences are decoding.
    """
    running = list(running)
    decoding = sorted((sequence for sequence in running if sequence.decoding), key=lambda sequence: sequence.slot)
    rows = DecodeRows(
        [sequence.generated[-1] for sequence in decoding],
        [sequence.slot for sequence in decoding],
        [sequence.num_computed for sequence in decoding],
    )
    prefilling, chunks = [], []
    left = max(max_rows - len(decoding), 1)
    for sequence in running:
        if sequence.decoding or not left:
            continue
        chunk = next_chunk(sequence, left)
        left -= chunk.end - chunk.start
        prefilling.append(sequence)
        chunks.append(chunk)
    return StepWork(decoding, rows, prefilling, chunks)


def next_chunk(sequence: Sequence, max_rows: int) -> Chunk:
    """The next piece of a prompt, at most ``max_rows`` positions long."""
    assert sequence.embeds is not None, "a sequence in prefill has its embeddings"
    length = min(sequence.num_left, max_rows)
    begin = len(sequence.embeds) - sequence.num_left
    embeds = sequence.embeds[begin : begin + length]  # [T, D]
    return Chunk(sequence.slot, sequence.num_computed, embeds, length == sequence.num_left)


def has_room(running: Iterable[Sequence], max_rows: int) -> bool:
    """True if the next step has rows left for another prompt."""
    return sum(sequence.num_left + sequence.decoding for sequence in running) < max_rows


def mark_computed(batch: StepWork) -> list[Sequence]:
    """Record that a batch has been computed.

    Returns:
        The sequences that get their next token from the step's logits, in the order of the logits' rows.
    """
    for sequence in batch.decoding:
        sequence.num_computed += 1
    receivers = list(batch.decoding)
    for sequence, chunk in zip(batch.prefilling, batch.chunks, strict=True):
        sequence.num_computed = chunk.end
        assert sequence.allocation is not None, "a running sequence has a slot"
        sequence.allocation.slot.content = sequence.prompt.head(chunk.end)
        if chunk.final:
            sequence.embeds = None
            receivers.append(sequence)
    return receivers
