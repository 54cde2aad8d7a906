"""The text of an answer that another worker began: its tokens first, then the engine's."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

from babydoctor.engine.stops import Detokenizer, StopFilter


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
