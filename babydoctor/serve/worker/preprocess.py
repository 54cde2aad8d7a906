"""Convert a request to the engine's input: token ids, pixels, sampling. Runs in threads, not in the event loop."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.conversation import get_template, move_image_first, render_continuation, render_prompt, split_images
from babydoctor.data.tokens import encode
from babydoctor.engine.request import (
    EngineClosedError,
    EngineError,
    GenerationRequest,
    ImageInput,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
)
from babydoctor.engine.tokens.constraint import JsonConstraint, JsonGrammars
from babydoctor.errors import UserError
from babydoctor.eval.certainty.calibration import NUM_TOP
from babydoctor.imaging.isolation import load_pixels
from babydoctor.imaging.limits import DecodeLimits
from babydoctor.schema import Example, Segment, Turn
from babydoctor.serve.api.admission import decode_image
from babydoctor.serve.api.errors import ApiError, code_of_user_error, model_failed_error, overflow_error
from babydoctor.serve.api.protocol import MAX_NEW_TOKENS, GenerateRequest
from babydoctor.serve.logs import REQUEST_ID
from babydoctor.serve.settings import Limits
from babydoctor.serve.worker.resume import ResumedText

if TYPE_CHECKING:
    from babydoctor.engine.engine import Engine
    from babydoctor.model.run_dir import Run

PIXEL_CACHE_SIZE = 16
"""Number of images whose pixels are cached, so that a chat decodes its image once. 0.6 MB each at 224 px.

As many as requests run by default (``EngineSettings.max_running``)."""

CONTEXT_TOKENS = 8
"""Number of prompt tokens that are decoded together with the first token of a continued answer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that passed every check. ``generation`` is None if nothing is left to generate."""

    prompt_tokens: int
    images: tuple[bytes, ...] = field(repr=False)
    resumed: ResumedText | None
    generation: GenerationRequest | None


class Preprocessor:
    """Applies the run's tokenizer and image settings. All methods are thread-safe."""

    def __init__(self, run: Run, engine: Engine, limits: Limits) -> None:
        self._run = run
        self._engine = engine
        self._limits = limits
        self._num_patches = run.model.num_patches
        self._control_ids = frozenset(run.tokenizer.all_special_ids)
        self._grammars = JsonGrammars(run.tokenizer, engine.vocab_size, engine.eos)
        self._pixels: OrderedDict[str, np.ndarray] = OrderedDict()

    def split_prompt(self, prompt: str) -> tuple[Segment, ...]:
        """A rendered prompt with ``<image>`` for each image -> segments for ``tokens.encode``.

        Some clients write the begin-of-sequence token of the published chat template, which ``tokens.encode`` adds. A
        single image moves to the front of the first question, where LLaVA's training and its clients put it.
        """
        template = get_template(self._run.manifest.template)
        return split_images(move_image_first(prompt.removeprefix(template.begin), template))

    def encode(self, prompt: str) -> Example:
        """A rendered prompt -> ids and image positions."""
        return encode(self.split_prompt(prompt), self._run.tokenizer, self._num_patches)

    def _encode_request(self, request: GenerateRequest) -> Example:
        """Encode the turns if the client sent messages, so that no text in them can become a control token.

        A client of the LLaVA protocol writes the whole prompt itself, control tokens included.

        Raises:
            ApiError: the turns do not alternate.
        """
        if not request.turns:
            return self.encode(request.prompt)
        turns = [Turn(turn.role, turn.text) for turn in request.turns]
        template = get_template(self._run.manifest.template)
        render = render_continuation if request.continues else render_prompt
        try:
            segments = render(turns, template, system=request.system)
        except UserError as error:
            raise ApiError(code_of_user_error(error), f"{error}.", param="turns") from None
        return encode(segments, self._run.tokenizer, self._num_patches)

    def prepare(self, request: GenerateRequest) -> Prepared:
        """Decode the images, tokenize the prompt and check that there is room for an answer.

        Raises:
            ApiError: 413 or 422; an image cannot be decoded, or a field is not valid.
        """
        images = tuple(decode_image(text, index) for index, text in enumerate(request.images or ()))
        example = self._encode_request(request)
        resume_ids = tuple(request.resume_ids or ())
        self._check_resume_ids(resume_ids)
        spelled_after = _last_text_ids(example) if request.continues else ()
        max_new_tokens = min(request.max_new_tokens, MAX_NEW_TOKENS, self._engine.max_context - len(example))
        if max_new_tokens < 1:
            raise overflow_error()
        num_left = max_new_tokens - len(resume_ids)
        resumed = None
        if resume_ids:
            resumed = ResumedText(self._run.tokenizer, resume_ids, request.stops, self._engine.eos, spelled_after)
            if resumed.ended or num_left < 1:
                return Prepared(len(example), images, resumed, None)
        generation = GenerationRequest(
            input_ids=np.concatenate([example.input_ids, np.array(resume_ids, dtype=np.int32)]),
            image_mask=np.concatenate([example.image_mask, np.zeros(len(resume_ids), dtype=bool)]),
            images=tuple(self.load(data, index) for index, data in enumerate(images)),
            max_new_tokens=num_left,
            temperature=max(0.0, request.temperature),
            # The protocol allows 0, which means the likeliest token only.
            top_p=max(request.top_p, 1e-6),
            top_k=max(0, request.top_k),
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=tuple((request.logit_bias or {}).items()),
            stop=request.stops,
            seed=request.seed,
            logprobs=_num_logprobs(request),
            timeout_s=self._limits.request_timeout_s,
            ignore_eos=request.ignore_eos,
            constraint=self._constraint(request.json_schema, resume_ids),
            num_resumed=len(resume_ids),
            spelled_after=spelled_after,
            request_id=REQUEST_ID.get() or "",
        )
        return Prepared(len(example), images, resumed, generation)

    def _check_resume_ids(self, resume_ids: tuple[int, ...]) -> None:
        """Check that a model can have generated these tokens.

        Raises:
            ApiError: an id is beyond the vocabulary, or a control token other than a final end-of-text token.
        """
        if any(token_id >= len(self._run.tokenizer) for token_id in resume_ids):
            raise ApiError("bad_resume_ids", "resume_ids contains ids beyond the vocabulary.", param="resume_ids")
        inner = resume_ids[:-1] if resume_ids and resume_ids[-1] in self._engine.eos else resume_ids
        if self._control_ids.intersection(inner):
            raise ApiError("bad_resume_ids", "resume_ids contains control tokens.", param="resume_ids")

    def _constraint(self, schema: dict[str, Any] | None, resume_ids: tuple[int, ...]) -> JsonConstraint | None:
        if schema is None:
            return None
        try:
            return self._grammars.constraint(schema, resume_ids)
        except InvalidRequestError as error:
            raise ApiError("bad_schema", f"{error}.", param="response_format") from None

    def load(self, data: bytes, index: int) -> ImageInput:
        """Decode an image, or take its pixels from the cache, whose key is a hash of content and settings."""
        settings = self._run.manifest.image
        key = hashlib.sha256(repr(settings).encode() + b"\0" + data).hexdigest()
        pixels = self._pixels.get(key)
        if pixels is None:
            try:
                pixels = load_pixels(data, settings, limits=decode_limits(self._limits))
            except UserError as error:
                raise image_error(error, index) from None
            self._pixels[key] = pixels
            while len(self._pixels) > PIXEL_CACHE_SIZE:
                self._pixels.popitem(last=False)
        return ImageInput(key, pixels)


def _num_logprobs(request: GenerateRequest) -> int | None:
    """Alternatives of each token that the client or its confidence needs; None: no log-probabilities."""
    asked = min(20, int(request.logprobs) - 1) if request.logprobs else None
    return max(asked or 0, NUM_TOP) if request.confidence else asked


def _last_text_ids(example: Example) -> tuple[int, ...]:
    """The last tokens of a prompt after its last image, enough to decode the tokens that follow."""
    ids = example.input_ids[-CONTEXT_TOKENS:]
    is_image = example.image_mask[-CONTEXT_TOKENS:]
    start = int(np.flatnonzero(is_image)[-1]) + 1 if is_image.any() else 0
    return tuple(ids[start:].tolist())


def decode_limits(limits: Limits) -> DecodeLimits:
    """Limits for decoding one image of a request."""
    return DecodeLimits(
        max_pixels=limits.max_pixels, seconds=limits.decode_seconds, memory_bytes=limits.decode_memory_bytes
    )


def image_error(error: UserError, index: int) -> ApiError:
    """The API's error for an image that cannot be decoded."""
    return ApiError(code_of_user_error(error), str(error), param=f"images[{index}]")


def api_error(error: EngineError) -> ApiError:
    """The engine's error as an API error."""
    if isinstance(error, PromptTooLongError):
        return overflow_error()
    if isinstance(error, QueueFullError):
        return ApiError("queue_full", "The model is busy. Please try again soon.")
    if isinstance(error, EngineClosedError):
        return ApiError("draining", "The worker is shutting down.")
    if isinstance(error, InvalidRequestError):
        return ApiError("bad_request", f"The request cannot be run: {error}.")
    return model_failed_error()
