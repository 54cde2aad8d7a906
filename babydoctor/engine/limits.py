"""What a request must be before the engine takes it. Pure."""

from __future__ import annotations

import numpy as np

from babydoctor.engine.request import MAX_TOP_LOGPROBS, GenerationRequest, InvalidRequestError


def check_request(request: GenerationRequest, *, vocabulary: int, num_patches: int) -> None:
    """Refuse what cannot be meant.

    Raises:
        InvalidRequestError: naming the field and its value.
    """
    ids = np.asarray(request.input_ids)
    mask = None if request.image_mask is None else np.asarray(request.image_mask, bool)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidRequestError(f"input_ids must be a row of at least one integer, not {ids.dtype} {ids.shape}")
    if mask is not None and mask.shape != ids.shape:
        raise InvalidRequestError(f"image_mask has the shape {mask.shape}, input_ids {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InvalidRequestError(f"input_ids must lie in 0 .. {vocabulary - 1}")
    marked = 0 if mask is None else int(mask.sum())
    if marked != len(request.images) * num_patches:
        raise InvalidRequestError(
            f"{len(request.images)} images take {num_patches} positions each, but image_mask marks {marked}"
        )
    if request.max_new_tokens < 1:
        raise InvalidRequestError(f"max_new_tokens={request.max_new_tokens} must be at least 1")
    if not 0 <= request.temperature < float("inf"):
        raise InvalidRequestError(f"temperature={request.temperature} must be 0 or more")
    if not 0 < request.top_p <= 1:
        raise InvalidRequestError(f"top_p={request.top_p} must lie above 0 and not above 1")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequestError(f"logprobs={request.logprobs} must lie in 0 .. {MAX_TOP_LOGPROBS}")
    if request.seed is not None and request.seed < 0:
        raise InvalidRequestError(f"seed={request.seed} must not be negative")
    if request.top_k < 0:
        raise InvalidRequestError(f"top_k={request.top_k} must be 0 (off) or more")
    if not 0 <= request.min_p <= 1:
        raise InvalidRequestError(f"min_p={request.min_p} must lie in 0 .. 1")
    if not request.repetition_penalty > 0:
        raise InvalidRequestError(f"repetition_penalty={request.repetition_penalty} must be above 0")
    for token, _ in request.logit_bias:
        if not 0 <= token < vocabulary:
            raise InvalidRequestError(f"logit_bias names token {token}; ids lie in 0 .. {vocabulary - 1}")
    if any(not stop for stop in request.stop):
        raise InvalidRequestError("a stop string is empty")
