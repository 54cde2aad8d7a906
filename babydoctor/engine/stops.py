"""From token ids to text that may be shown: whole characters, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer writes for bytes that are not (yet) a whole character."""

LONGEST_CHARACTER = 4
"""Bytes, and so byte tokens, of the longest UTF-8 character. Beyond that a replacement character is meant as it is."""


class Detokenizer:
    """Text of a growing list of tokens, without decoding all of it again each time.

    A tokenizer's decoding of a token depends on its neighbours (SentencePiece drops a leading space; bytes join to
    characters). So a short window is decoded with and without the new tokens, and the difference is the new text.
    The text continues that of the tokens ``before``, which is not repeated.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        # The library's own tokenizer where there is one: the wrapper around it costs five times as much (measured).
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_ids: Callable[..., str] = (
            partial(tokenizer.decode, clean_up_tokenization_spaces=False) if backend is None else backend.decode
        )
        self.token_ids: list[int] = list(before)
        self._window = 0
        self._done = len(before)

    def add(self, token_id: int) -> str:
        """Take one more token; return the text that is certain now, "" inside a character."""
        self.token_ids.append(token_id)
        before = self._decode(self.token_ids[self._window : self._done])
        after = self._decode(self.token_ids[self._window :])
        unfinished = after.endswith(REPLACEMENT) and len(self.token_ids) - self._done < LONGEST_CHARACTER
        if unfinished or len(after) <= len(before):
            return ""
        self._window, self._done = self._done, len(self.token_ids)
        return after[len(before) :]

    def flush(self) -> str:
        """The rest when no token will follow; bytes that never became a character are shown as U+FFFD."""
        before = self._decode(self.token_ids[self._window : self._done])
        after = self._decode(self.token_ids[self._window :])
        self._window = self._done = len(self.token_ids)
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._decode_ids(token_ids, skip_special_tokens=True)


class StopFilter:
    """Lets text through up to the first stop string, and holds back an end that could begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """Take more text; return what may be shown. After ``found`` is set, nothing more may be."""
        assert self.found is None, "text after the stop string"
        if not self.stop:
            return text
        self.held += text
        matches = [(self.held.find(stop), -len(stop), stop) for stop in self.stop if stop in self.held]
        if matches:
            # The first to begin ends the answer; of those that begin together, the longest.
            start, _, self.found = min(matches)
            shown, self.held = self.held[:start], ""
            return shown
        keep = max(_overlap(self.held, stop) for stop in self.stop)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, when no text will follow."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
