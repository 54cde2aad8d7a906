"""Text of given tokens: of an answer that another worker began, and of one that is looked at again."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np

from babydoctor.data.tokens import encode
from babydoctor.engine.stops import Detokenizer, StopFilter
from babydoctor.schema import IGNORE_INDEX, Segment


class ResumedText:
    """Decodes all tokens as one answer, so that words, characters and stop strings may lie across the seam.

    Args:
        token_ids: what was generated before.
        stops: strings that end the answer.
        eos: tokens that end it.
    """

    def __init__(self, tokenizer: Any, token_ids: Sequence[int], stops: Sequence[str], eos: Container[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._filter = StopFilter(stops)
        self._text = ""
        self.ended = bool(token_ids) and token_ids[-1] in eos
        self.add(token_ids)

    def add(self, token_ids: Iterable[int]) -> str:
        """Take more tokens; returns the whole text so far. ``ended`` is set when a stop string is complete."""
        for token_id in token_ids:
            if self._filter.found is None:
                self._text += self._filter.add(self._detokenizer.add(token_id))
        self.ended = self.ended or self._filter.found is not None
        return self._text

    def flush(self) -> str:
        """No token will follow; returns the whole text."""
        if self._filter.found is None:
            self._text += self._filter.add(self._detokenizer.flush())
        if self._filter.found is None:
            self._text += self._filter.flush()
        return self._text


def label_rows(tokenizer: Any, token_ids: Sequence[int], rows: np.ndarray, text: str) -> list[dict[str, Any]]:
    """Join each token's piece of ``text`` with its row of ``rows`` ``[A, P]``.

    Tokens that only together make a character become one piece, with the mean of their rows.
    """
    detokenizer = Detokenizer(tokenizer)
    pieces: list[tuple[str, list[np.ndarray]]] = []
    waiting: list[np.ndarray] = []
    for index, (token_id, row) in enumerate(zip(token_ids, rows, strict=True)):
        waiting.append(row)
        piece = detokenizer.add(token_id)
        if index == len(token_ids) - 1:
            piece += detokenizer.flush()
        if piece:
            pieces.append((piece, waiting))
            waiting = []
    # A tokenizer may drop the space in front and such; the pieces shall join to the text that was given.
    joined = "".join(piece for piece, _ in pieces)
    start = text.find(joined)
    if pieces and joined != text and start >= 0:
        pieces[0] = (text[:start] + pieces[0][0], pieces[0][1])
        pieces[-1] = (pieces[-1][0] + text[start + len(joined) :], pieces[-1][1])
    return [{"text": piece, "weights": np.mean(own, axis=0).tolist()} for piece, own in pieces]


def drops_first_space(tokenizer: Any) -> bool:
    """Whether the space in front of an answer's first word is lost in decoding, as SentencePiece tokenizers do.

    Then an answer that was received without it was generated with it, in other tokens.
    """
    example = encode((Segment("a"), Segment(" a", supervised=True)), tokenizer, num_patches=0)
    token_ids = example.input_ids[example.labels != IGNORE_INDEX].tolist()
    return str(tokenizer.decode(token_ids)) == "a"
