"""Token ids to text that may be shown: whole characters, and nothing that could become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

REPLACEMENT = "\ufffd"
"""A tokenizer writes this for bytes that are not (yet) a whole character."""

LONGEST_CHARACTER = 4
"""Bytes, and so byte tokens, of the longest UTF-8 character. The first of that many invalid ones stays invalid."""


class Detokenizer:
    """Incremental text of a growing list of tokens.

    The text of a token depends on its neighbors: SentencePiece drops a leading space, and bytes combine to characters.
    So a short window is decoded with and without the new tokens, and the difference is the new text. The text follows
    that of the tokens ``before``, which is not repeated.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        # The Rust tokenizer if there is one. transformers' wrapper takes five times as long (measured).
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_ids: Callable[..., str] = (
            partial(tokenizer.decode, clean_up_tokenization_spaces=False) if backend is None else backend.decode
        )
        self.token_ids: list[int] = list(before)
        self._window = 0
        self._done = len(before)

    def add(self, token_id: int) -> str:
        """Add a token and return the text that is now final: "" while a character is incomplete."""
        self.token_ids.append(token_id)
        before = self._decode(self.token_ids[self._window : self._done])
        after = self._decode(self.token_ids[self._window :])
        if after.endswith(REPLACEMENT):
            if len(self.token_ids) - self._done < LONGEST_CHARACTER:
                return ""
            # The first token that waits is part of no character. The last ones can still be the start of one.
            oldest = self._decode(self.token_ids[self._window : self._done + 1])
            self._done += 1
            return oldest[len(before) :]
        if len(after) <= len(before):
            return ""
        self._window, self._done = self._done, len(self.token_ids)
        return after[len(before) :]

    def flush(self) -> str:
        """The remaining text when no token follows. Bytes of incomplete characters become U+FFFD."""
        before = self._decode(self.token_ids[self._window : self._done])
        after = self._decode(self.token_ids[self._window :])
        self._window = self._done = len(self.token_ids)
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._decode_ids(token_ids, skip_special_tokens=True)


class StopFilter:
    """Passes text up to the first stop string and holds back an ending that could start one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """Add text and return what may be shown. Must not be called once ``found`` is set."""
        assert self.found is None, "text after the stop string"
        if not self.stop:
            return text
        self.held += text
        matches = [(self.held.find(stop), -len(stop), stop) for stop in self.stop if stop in self.held]
        if matches:
            # The stop string that starts first ends the answer; of those with the same start, the longest.
            start, _, self.found = min(matches)
            shown, self.held = self.held[:start], ""
            return shown
        keep = max(_overlap(self.held, stop) for stop in self.stop)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """The held-back text, when no text follows."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that is a start of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def end_tokens(language_model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the end-of-text tokens of the tokenizer and of the model's generation config."""
    ends: set[int] = set()
    for source in (tokenizer, getattr(language_model, "generation_config", None)):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            ends.update(eos if isinstance(eos, list | tuple) else [eos])
    return frozenset(ends)
