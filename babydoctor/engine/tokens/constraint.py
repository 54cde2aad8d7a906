"""Constrained decoding: allow only tokens that keep the answer valid JSON of a given schema (llguidance).

Source: https://github.com/guidance-ai/llguidance. Does not import torch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from babydoctor.engine.request import InvalidRequestError, RequestFailedError


class JsonGrammars:
    """Compiles JSON schemas for one tokenizer. Thread-safe.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab_size: size of the logits' last dimension, at least the tokenizer's vocabulary.
        eos: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos)
        self._lock = threading.Lock()
        self._compiled: Any = None

    def constraint(self, schema: Mapping[str, Any], generated: Sequence[int] = ()) -> JsonConstraint:
        """A constraint for one answer that starts with the tokens ``generated``.

        Raises:
            InvalidRequestError: the schema is invalid or uses what llguidance cannot enforce.
        """
        import llguidance

        # By default llguidance allows unlimited white space. JSON needs at most one space.
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        text = json.dumps(dict(schema) | {"x-guidance": options})
        tokenizer = self._llguidance_tokenizer()
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
            problem = llguidance.LLMatcher.validate_grammar(grammar, tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise InvalidRequestError(f"the JSON schema cannot be enforced: {problem.splitlines()[0]}")
        constraint = JsonConstraint(llguidance.LLMatcher(tokenizer, grammar, log_level=0))
        for token in generated:
            constraint.accept(token)
        return constraint

    def _llguidance_tokenizer(self) -> Any:
        """Built once, because it takes a second for 32,000 tokens."""
        import llguidance.hf

        with self._lock:
            if self._compiled is None:
                self._compiled = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos or None
                )
            return self._compiled


class JsonConstraint:
    """The grammar of one answer, and its state."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """True if the answer is complete."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Advance by one generated token.

        Raises:
            RequestFailedError: the grammar does not allow the token.
        """
        if not self.finished and not self._matcher.consume_token(token):
            raise RequestFailedError(f"the grammar does not allow the token {token}")

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Bool ``[V]``: True for tokens that may follow.

        Raises:
            RequestFailedError: the grammar failed.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RequestFailedError(f"the grammar failed: {self._matcher.get_error()}")
        allowed = np.zeros(vocab_size, bool)
        unpacked = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        allowed[: len(unpacked)] = unpacked
        return allowed
