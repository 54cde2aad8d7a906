"""Sampling of the next token. Each request has its own settings and random numbers.

Shapes: ``R`` rows of logits, ``V`` vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from babydoctor.engine.request import GenerationRequest

NUCLEUS_CANDIDATES = 256
"""Top-p examines this many likeliest tokens first. It sorts the whole vocabulary only if they are not enough."""


def build_random(request: GenerationRequest) -> np.random.Generator:
    """The random numbers of one request. They depend only on its seed, not on other requests."""
    return np.random.default_rng(request.seed)


def likeliest(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """The likeliest token of each row of float32 ``[R, V]``, and whether its logit is finite."""
    if logits.device.type == "cpu":
        # numpy uses vector instructions; torch's reduction takes eight times as long (measured).
        array = logits.numpy()
        best = array.argmax(axis=-1)
        return best.tolist(), np.isfinite(array[np.arange(len(array)), best]).tolist()
    values, tokens = logits.max(dim=-1)
    both: list[list[int]] = torch.stack([tokens, torch.isfinite(values)]).tolist()  # one wait for the GPU
    return both[0], [bool(finite) for finite in both[1]]


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    random: np.random.Generator,
    *,
    top_k: int = 0,
    min_p: float = 0.0,
) -> int:
    """Draw a token from float32 ``logits`` ``[V]`` at ``temperature``, from the nucleus of mass ``top_p``.

    The nucleus is the smallest set of likeliest tokens whose probabilities sum to at least ``top_p`` (Holtzman et al.
    2020, as in transformers). Before that, ``min_p`` drops tokens below that share of the largest probability, and
    ``top_k`` keeps the likeliest ones (0: all), as in vLLM. The draw inverts the cumulative distribution at one uniform
    random number.
    """
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if min_p > 0:
        probabilities = torch.where(probabilities < min_p * probabilities.max(), 0.0, probabilities)
    if top_k > 0:
        top, tokens = probabilities.topk(min(top_k, len(probabilities)))
    elif top_p >= 1.0:
        return _invert(probabilities.cumsum(0), random)
    else:
        top, tokens = probabilities.topk(min(NUCLEUS_CANDIDATES, len(probabilities)))
        if float(top.sum()) < top_p:
            top, tokens = probabilities.sort(descending=True, stable=True)
    cumulated = top.cumsum(0)
    if top_p < 1.0:
        kept = float(cumulated[-1] if top_k > 0 else probabilities.sum()) if top_k > 0 or min_p > 0 else 1.0
        mass = torch.tensor(top_p * kept, dtype=cumulated.dtype, device=cumulated.device)
        cumulated = cumulated[: int(torch.searchsorted(cumulated, mass)) + 1]
    return int(tokens[_invert(cumulated, random)])


def _invert(cumulated: torch.Tensor, random: np.random.Generator) -> int:
    point = torch.tensor(random.random(), dtype=cumulated.dtype, device=cumulated.device) * cumulated[-1]
    # right=True: a point on a boundary belongs to the next token, so tokens with probability 0 are never drawn.
    index = int(torch.searchsorted(cumulated, point, right=True))
    return min(index, len(cumulated) - 1)


def log_probabilities(logits: torch.Tensor, token: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of ``token`` for ``logits`` ``[V]`` at temperature 1, and of the ``num_top`` likeliest tokens."""
    scores = torch.log_softmax(logits.float(), dim=-1)
    if not num_top:
        return float(scores[token]), []
    values, tokens = scores.topk(min(num_top, len(scores)))
    return float(scores[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
