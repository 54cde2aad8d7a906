"""Decode given tokens: those of an answer that another worker began, or whose occlusion map is requested."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np

from babydoctor.data.tokens import encode
from babydoctor.engine.tokens.stops import Detokenizer, StopFilter
from babydoctor.schema import IGNORE_INDEX, Segment


class ResumedText:
    """Decodes old and new tokens as one answer, so that words, characters and stop strings may span both.

    Args:
        token_ids: the tokens generated before.
        stops: strings that end the answer.
        eos: tokens that end the answer.
        spelled_after: tokens of the prompt whose text the answer continues.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_ids: Sequence[int],
        stops: Sequence[str],
        eos: Container[int],
        spelled_after: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, spelled_after)
        self._filter = StopFilter(stops)
        self.ended = bool(token_ids) and token_ids[-1] in eos
        self._unread = ""
        self._unread = self.add(token_ids[:-1] if self.ended else token_ids)

    def add(self, token_ids: Iterable[int]) -> str:
        """Append tokens and return the new text. The first call also returns the text of the constructor's tokens.

        ``ended`` is set when a stop string is complete.
        """
        text, self._unread = self._unread, ""
        for token_id in token_ids:
            if self._filter.found is None:
                text += self._filter.add(self._detokenizer.add(token_id))
        self.ended = self.ended or self._filter.found is not None
        return text

    def flush(self) -> str:
        """Return the rest of the text. Call it after the last token."""
        text, self._unread = self._unread, ""
        if self._filter.found is None:
            text += self._filter.add(self._detokenizer.flush())
        if self._filter.found is None:
            text += self._filter.flush()
        return text


def label_rows(tokenizer: Any, token_ids: Sequence[int], rows: np.ndarray, text: str) -> list[dict[str, Any]]:
    """Pair each token's piece of ``text`` with its row of ``rows`` ``[A, P]``, ``A`` tokens and ``P`` image cells.

    Tokens that only together form a character become one piece, with the mean of their rows.
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
    # The tokenizer may have dropped the leading space, but the pieces must join to the given text.
    joined = "".join(piece for piece, _ in pieces)
    start = text.find(joined)
    if pieces and joined != text and start >= 0:
        pieces[0] = (text[:start] + pieces[0][0], pieces[0][1])
        pieces[-1] = (pieces[-1][0] + text[start + len(joined) :], pieces[-1][1])
    return [{"text": piece, "weights": np.mean(own, axis=0).tolist()} for piece, own in pieces]


def drops_first_space(tokenizer: Any) -> bool:
    """True if decoding drops the space before an answer's first word, as SentencePiece tokenizers do.

    The model generated such an answer with the space, so encoding its text without the space gives other tokens.
    """
    example = encode((Segment("a"), Segment(" a", supervised=True)), tokenizer, num_patches=0)
    token_ids = example.input_ids[example.labels != IGNORE_INDEX].tolist()
    return str(tokenizer.decode(token_ids)) == "a"
