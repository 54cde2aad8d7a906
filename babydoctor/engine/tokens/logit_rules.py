"""Penalties, biases and grammars, applied to a request's logits before its next token is chosen.

Meaning and order are those of vLLM: repetition penalty, frequency and presence penalty, bias, then the grammar's mask.
Shapes: ``V`` vocabulary.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from babydoctor.engine.request import GenerationRequest


class LogitRules:
    """The rules of one request, and the tokens they depend on."""

    def __init__(self, request: GenerationRequest) -> None:
        ids = np.asarray(request.input_ids)
        num_prompt = len(ids) - request.num_resumed
        is_text = np.ones(num_prompt, bool)
        if request.image_mask is not None:
            is_text = ~np.asarray(request.image_mask, bool)[:num_prompt]
        self._request = request
        self._prompt_ids = frozenset(ids[:num_prompt][is_text].tolist()) if request.repetition_penalty != 1 else ()
        self._counts: Counter[int] = Counter(ids[num_prompt:].tolist())

    @staticmethod
    def needed(request: GenerationRequest) -> bool:
        """True if the request has any rule."""
        penalties = request.presence_penalty or request.frequency_penalty or request.repetition_penalty != 1
        return bool(penalties or request.logit_bias or request.constraint is not None)

    @property
    def finished(self) -> bool:
        """True if the grammar allows no further token."""
        constraint = self._request.constraint
        return constraint is not None and constraint.finished

    def accept(self, token: int) -> None:
        """Record a generated token."""
        self._counts[token] += 1
        if self._request.constraint is not None:
            self._request.constraint.accept(token)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 ``[V]`` -> a changed copy ``[V]``. Forbidden tokens get minus infinity.

        Raises:
            EngineError: the grammar failed.
        """
        request, device = self._request, logits.device
        logits = logits.clone()
        if request.repetition_penalty != 1:
            seen = torch.tensor(sorted({*self._prompt_ids, *self._counts}), dtype=torch.long, device=device)
            scores = logits[seen]
            penalty = request.repetition_penalty
            logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if self._counts and (request.frequency_penalty or request.presence_penalty):
            ids = torch.tensor(list(self._counts), dtype=torch.long, device=device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=device)
            logits[ids] -= request.frequency_penalty * counts + request.presence_penalty
        for token, bias in request.logit_bias:
            logits[token] += bias
        if request.constraint is not None:
            allowed = torch.from_numpy(request.constraint.allowed(len(logits))).to(device)  # [V]
            logits = logits.masked_fill_(~allowed, float("-inf"))
        return logits
