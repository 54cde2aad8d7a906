"""State of one request inside the engine: its progress and its answer so far."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from babydoctor.engine.kv_cache import IMAGE_POSITION, Allocation, Content
from babydoctor.engine.request import (
    Delta,
    EngineError,
    Finished,
    FinishReason,
    GenerationHandle,
    TokenLogprob,
    Usage,
)
from babydoctor.engine.tokens.logit_rules import LogitRules
from babydoctor.engine.tokens.sampling import build_random, log_probabilities, sample
from babydoctor.engine.tokens.stops import Detokenizer, StopFilter


class Sequence:
    """State of one request. Only the engine's thread touches it.

    The slot holds the keys and values of the first ``num_computed`` positions. While that is less than the prompt, the
    sequence is in prefill. After that it decodes, and the last token of ``generated`` is not computed yet.
    """

    def __init__(self, handle: GenerationHandle, content: Content, max_new_tokens: int, tokenizer: Any) -> None:
        request = handle.request
        self.handle = handle
        self.request = request
        self.prompt = content
        self.max_new_tokens = max_new_tokens
        self.deadline = None if request.timeout_s is None else handle.submitted_at + request.timeout_s
        self.allocation: Allocation | None = None
        self.embeds: torch.Tensor | None = None
        self.num_computed = 0
        self.generated: list[int] = []
        self.text = ""
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self._tokenizer = tokenizer
        self._random = build_random(request)
        self._rules = LogitRules(request) if LogitRules.needed(request) else None
        self._detokenizer = Detokenizer(tokenizer, request.spelled_after)
        self._stops = StopFilter(request.stop)

    @property
    def slot(self) -> int:
        assert self.allocation is not None, "only a running sequence has a slot"
        return self.allocation.slot.index

    @property
    def decoding(self) -> bool:
        return bool(self.generated)

    @property
    def num_left(self) -> int:
        """Prompt positions that are not computed yet."""
        return len(self.prompt) - self.num_computed

    def computed_content(self) -> Content:
        """Content of the slot: the computed part of prompt and answer."""
        tokens = np.concatenate([self.prompt.tokens, np.asarray(self.generated, np.int64)])
        return Content(tokens, self.prompt.images).head(self.num_computed)

    def choose(self, logits: torch.Tensor, likeliest: int) -> tuple[int, tuple[TokenLogprob, ...]]:
        """The next token and its log probabilities, from float32 logits ``[V]`` and their likeliest token."""
        request = self.request
        token, scores = likeliest, logits
        if self._rules is not None:
            scores = self._rules.apply(logits)
            token = int(scores.argmax())
        if not request.greedy:
            token = sample(
                scores, request.temperature, request.top_p, self._random, top_k=request.top_k, min_p=request.min_p
            )
        if request.logprobs is None:
            return token, ()
        chosen, top = log_probabilities(logits, token, request.logprobs)
        alternatives = tuple((other, self._spell(other), value) for other, value in top)
        return token, (TokenLogprob(token, self._spell(token), chosen, alternatives),)

    def append(
        self, token: int, logprobs: tuple[TokenLogprob, ...], eos: frozenset[int]
    ) -> tuple[Delta, FinishReason | None]:
        """Append a token to the answer.

        Returns:
            The text that is now final, and why the answer ends, or None if it continues.
        """
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.generated.append(token)
        if self._rules is not None:
            self._rules.accept(token)
        reason: FinishReason | None = None
        is_end = token in eos and not self.request.ignore_eos
        # A tokenizer may not mark the end token as special, and would then spell it.
        shown = "" if is_end else self._stops.add(self._detokenizer.add(token))
        if self._stops.found is not None or is_end or (self._rules is not None and self._rules.finished):
            reason = "stop"
        elif len(self.generated) >= self.max_new_tokens:
            reason = "length"
        if reason is not None and self._stops.found is None:
            shown += self._flush()
            reason = "stop" if self._stops.found is not None else reason
        self.text += shown
        return Delta(shown, (token,), logprobs), reason

    def _flush(self) -> str:
        """The held-back text at the end of the answer, which may still complete a stop string."""
        shown = self._stops.add(self._detokenizer.flush())
        return shown if self._stops.found is not None else shown + self._stops.flush()

    def finish(self, reason: FinishReason, error: EngineError | None = None) -> Finished:
        """The last event. Held-back text is dropped unless the answer ended by itself."""
        now = time.monotonic()
        submitted = self.handle.submitted_at
        return Finished(
            finish_reason=reason,
            text=self.text,
            usage=Usage(len(self.prompt), len(self.generated), self.allocation.num_reused if self.allocation else 0),
            error=error,
            stop_string=self._stops.found,
            queue_s=(self.started_at or now) - submitted,
            first_token_s=None if self.first_token_at is None else self.first_token_at - submitted,
            total_s=now - submitted,
        )

    def _spell(self, token: int) -> str:
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)


def build_content(input_ids: np.ndarray, image_mask: np.ndarray | None, keys: tuple[str, ...]) -> Content:
    """Content of a prompt, to compare with the contents of slots.

    Args:
        input_ids: ``[T]``.
        image_mask: bool ``[T]``, True at image positions.
        keys: key of each image in order; every image has the same number of positions.
    """
    tokens = np.asarray(input_ids, np.int64).copy()
    if image_mask is None or not keys:
        return Content(tokens)
    tokens[image_mask] = IMAGE_POSITION
    positions = np.flatnonzero(image_mask)
    starts = positions[:: len(positions) // len(keys)]
    return Content(tokens, tuple((int(start), key) for start, key in zip(starts, keys, strict=True)))
