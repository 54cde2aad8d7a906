"""Check a request before the engine accepts it. Pure."""

from __future__ import annotations

import numpy as np

from babydoctor.engine.request import MAX_TOP_LOGPROBS, GenerationRequest, InvalidRequestError


def check_request(request: GenerationRequest, *, vocab_size: int, num_patches: int) -> None:
    """Check the values of a request.

    Raises:
        InvalidRequestError: a value is out of range; the message names the field and the value.
    """
    _check_prompt(request, vocab_size, num_patches)
    for name, is_valid, rule in (
        ("max_new_tokens", request.max_new_tokens >= 1, "be at least 1"),
        ("temperature", 0 <= request.temperature < float("inf"), "be 0 or more"),
        ("top_p", 0 < request.top_p <= 1, "be above 0 and at most 1"),
        ("logprobs", request.logprobs is None or 0 <= request.logprobs <= MAX_TOP_LOGPROBS, "be in 0 .. 20"),
        ("seed", request.seed is None or request.seed >= 0, "not be negative"),
        ("top_k", request.top_k >= 0, "be 0 (off) or more"),
        ("min_p", 0 <= request.min_p <= 1, "be in 0 .. 1"),
        ("repetition_penalty", request.repetition_penalty > 0, "be above 0"),
    ):
        if not is_valid:
            raise InvalidRequestError(f"{name}={getattr(request, name)} must {rule}")
    for token, _ in request.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"logit_bias names token {token}; ids are in 0 .. {vocab_size - 1}")
    if any(not stop for stop in request.stop):
        raise InvalidRequestError("a stop string is empty")


def _check_prompt(request: GenerationRequest, vocab_size: int, num_patches: int) -> None:
    ids = np.asarray(request.input_ids)
    mask = None if request.image_mask is None else np.asarray(request.image_mask, bool)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidRequestError(f"input_ids must be one row of integers and not empty, not {ids.dtype} {ids.shape}")
    if mask is not None and mask.shape != ids.shape:
        raise InvalidRequestError(f"image_mask has the shape {mask.shape}, input_ids {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise InvalidRequestError(f"input_ids must be in 0 .. {vocab_size - 1}")
    marked = 0 if mask is None else int(mask.sum())
    if marked != len(request.images) * num_patches:
        raise InvalidRequestError(
            f"{len(request.images)} images take {num_patches} positions each, but image_mask marks {marked}"
        )
