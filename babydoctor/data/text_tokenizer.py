"""A tokenizer that separates control tokens from users' text.

Tokenizers encode the characters ``</s>`` as the end-of-sequence token wherever they occur. In a user's question or a
reference answer they must stay characters: as a token they would end the answer or start a forged turn. Encoding the
parts separately would avoid that, but gives other ids where the parts meet. So the text is encoded as a whole by a
copy of the tokenizer whose control tokens have secret names. Only the template's text is rewritten to these names,
and nothing that users write can match them.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.schema import Segment
from babydoctor.templates import is_template_marker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(run: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], np.ndarray]:
    """Encode adjacent text segments as one string.

    Control tokens come from segments with ``control`` only; the same characters elsewhere are encoded as text.

    Returns:
        The ids, and for each the index of the segment that holds its last character (int64 ``[T]``).
    """
    return _text_tokenizer(tokenizer, len(tokenizer)).encode(run)


@functools.lru_cache(maxsize=8)
def _text_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int) -> TextTokenizer:
    """One cached copy per tokenizer. ``size`` is in the key because tokens may be added later."""
    return TextTokenizer(tokenizer)


class TextTokenizer:
    """The copy of a fast tokenizer in which control tokens have secret names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        backend: Any = tokenizer.backend_tokenizer
        parts = json.loads(backend.to_str())
        nonce = secrets.token_hex(8)
        self._secret: dict[str, str] = {}
        for added in parts["added_tokens"]:
            content = added["content"]
            if added["special"] or content in tokenizer.all_special_tokens or is_template_marker(content):
                # Private-use characters: no normalizer changes them, and no vocabulary splits words at them.
                self._secret[content] = f"\U000f0000{nonce}{added['id']}\U000f0001"
                added.update(content=self._secret[content], special=True, normalized=False)
        _rename(parts["model"], self._secret)
        parts.update(truncation=None, padding=None, post_processor=None, decoder=None)
        self._tokenizer = Tokenizer.from_str(json.dumps(parts))
        self._control = re.compile("|".join(re.escape(name) for name in sorted(self._secret, key=len, reverse=True)))
        # Added tokens may get other ids in the copy if the ids of the original have gaps.
        pairs = [(self._tokenizer.token_to_id(added["content"]), added["id"]) for added in parts["added_tokens"]]
        self._original_id = {copied: original for copied, original in pairs if copied != original}

    def encode(self, run: Sequence[Segment]) -> tuple[list[int], np.ndarray]:
        """See ``encode_text``."""
        texts = [self._name_controls(segment.text) if segment.control else segment.text for segment in run]
        encoded = self._tokenizer.encode("".join(texts), add_special_tokens=False)
        ids = encoded.ids
        if self._original_id:
            ids = [self._original_id.get(token_id, token_id) for token_id in ids]
        ends = np.cumsum([len(text) for text in texts])
        # A token that covers no character (the space SentencePiece puts in front) counts as its next character.
        last_char = [max(start, end - 1) for start, end in encoded.offsets]
        return ids, np.minimum(np.searchsorted(ends, last_char, side="right"), len(run) - 1)

    def _name_controls(self, text: str) -> str:
        return self._control.sub(lambda match: self._secret[match[0]], text) if self._secret else text


def _rename(model: dict[str, Any], secret: dict[str, str]) -> None:
    """Rename the control tokens in the vocabulary, too, so that merging characters cannot produce them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):  # BPE, WordPiece, WordLevel
        model["vocab"] = {secret.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[secret.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    if "merges" in model:
        pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not secret.keys() & {*pair, "".join(pair)}]
