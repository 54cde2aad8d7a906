"""Ask a model in this process: a run, an engine, conversation turns and an image in, answers out.

``Inference`` answers single questions, batches of them and streams. ``Conversation`` remembers its turns. The chat
command, the evaluation, the demo and the sample answers during training all use this module; serving talks to the
engine directly.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.conversation import get_template, image_first, render_prompt
from babydoctor.data.template_tokens import check_template, end_token_ids
from babydoctor.data.tokens import encode
from babydoctor.engine.engine import Engine
from babydoctor.engine.request import (
    Delta,
    GenerationHandle,
    GenerationRequest,
    ImageInput,
    InvalidRequestError,
    PromptTooLongError,
    TokenLogprob,
)
from babydoctor.engine.settings import build_settings
from babydoctor.schema import Example, Turn, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from babydoctor.model.babydoctor import BabyDoctor
    from babydoctor.model.run_dir import Manifest, Run


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A conversation that ends with the user's turn, and how to answer it.

    Attributes:
        turns: the first turn holds ``<image>`` if there is an image; see ``user_turn``.
        pixels: float32 ``[3, S, S]`` from ``to_pixels``, or None without an image.
        system: system prompt; None: the template's.
        logprobs: return the log probability of each token and of this many alternatives; None: do not.
        id: name of the query in error messages.
    """

    turns: Sequence[Turn]
    pixels: np.ndarray | None = field(default=None, repr=False)
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    id: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer.

    ``finish_reason`` is the engine's, or starts with "error" if the query was refused; ``text`` is then empty.
    ``logprobs`` is empty unless the query asked for it.
    """

    text: str
    finish_reason: str
    num_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


def user_turn(question: str, *, has_image: bool) -> Turn:
    """The first turn of a conversation. An image comes before the text, as in training."""
    return Turn("user", image_first(question) if has_image else question)


class Inference:
    """A model with an engine. Use it as a context manager: the engine runs inside the ``with`` block.

    The model is switched to evaluation mode inside the block and back to its previous mode after it.
    """

    def __init__(
        self,
        model: BabyDoctor,
        tokenizer: PreTrainedTokenizerBase,
        manifest: Manifest,
        *,
        num_tokens: int,
        batch_size: int = 1,
        template: str | None = None,
        engine: Mapping[str, Any] | None = None,
        own_weights: bool = False,
    ) -> None:
        """Build the engine.

        Args:
            num_tokens: longest prompt plus answer, image slots included. It sizes the KV cache and is capped at the
                model's context length.
            batch_size: queries answered at the same time.
            template: conversation template; None: the manifest's.
            engine: settings that replace the defaults, see ``engine.settings.EngineSettings``.
            own_weights: the model is of no use afterwards, which saves memory; see ``EngineSettings``.

        Raises:
            UserError: an engine setting is wrong, the KV cache does not fit in memory, or the tokenizer lacks the
                template's tokens.
        """
        self.model = model
        self.image_settings = manifest.image
        self.batch_size = batch_size
        self._tokenizer = tokenizer
        self.template = get_template(template or manifest.template)
        check_template(self.template, tokenizer, manifest.language_model, fix="use template={template}")
        context = min(num_tokens, model.language_model.config.max_position_embeddings)
        defaults: dict[str, Any] = {"max_running": batch_size, "max_queue": 4 * batch_size, "max_context": context}
        defaults["own_weights"] = own_weights
        if batch_size == 1:
            defaults["cached_slots"] = 0
        ends = end_token_ids(self.template, tokenizer)
        self.engine = Engine(model, tokenizer, build_settings(engine or {}, **defaults), template_ends=ends)
        self._was_training = False

    @classmethod
    def for_queries(
        cls,
        model: BabyDoctor,
        tokenizer: PreTrainedTokenizerBase,
        manifest: Manifest,
        queries: Iterable[Query],
        *,
        template: str | None = None,
        **options: Any,
    ) -> Inference:
        """Build an engine for these queries. Their pixels are not needed yet, only the text."""
        chosen = template or manifest.template
        longest = max(
            (
                len(_encode(query.turns, query.system, chosen, tokenizer, model.num_patches)) + query.max_new_tokens
                for query in queries
            ),
            default=1,
        )
        return cls(model, tokenizer, manifest, num_tokens=longest, template=template, **options)

    def __enter__(self) -> Inference:
        self._was_training = self.model.training
        self.model.eval()
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        self.model.train(self._was_training)

    def answer(self, query: Query) -> Answer:
        """Answer one query."""
        (answer,) = self.answers([query])
        return answer

    def answers(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Yield the answers in the order of the queries.

        Queries are read ahead by one batch, so the engine does not wait while the next image is loaded. A query that
        the engine refuses gets an answer whose ``finish_reason`` starts with "error".

        Raises:
            EngineError: the engine stopped, or a computation failed.
        """
        waiting: deque[GenerationHandle | Answer] = deque()
        for query in queries:
            try:
                waiting.append(self._submit(query))
            except (InvalidRequestError, PromptTooLongError) as error:
                waiting.append(Answer("", f"error: {error}"))
            if len(waiting) >= 2 * self.batch_size:
                yield _wait(waiting.popleft())
        while waiting:
            yield _wait(waiting.popleft())

    def stream(self, query: Query) -> Iterator[str]:
        """Yield the answer piece by piece.

        Raises:
            EngineError: the query was refused, or the computation failed.
        """
        handle = self._submit(query)
        try:
            for event in handle:
                if isinstance(event, Delta):
                    yield event.text
        finally:
            handle.cancel()  # the reader may stop early; a finished request is unaffected
        handle.result()

    def encode(self, turns: Sequence[Turn], system: str | None = None) -> Example:
        """Token ids of a prompt, with ``num_patches`` slots for each image."""
        return _encode(turns, system, self.template.name, self._tokenizer, self.model.num_patches)

    def _submit(self, query: Query) -> GenerationHandle:
        prompt = self.encode(query.turns, query.system)
        room = self.engine.max_context - len(prompt)
        images: tuple[ImageInput, ...] = ()
        if query.pixels is not None:
            key = hashlib.sha256(np.ascontiguousarray(query.pixels).tobytes()).hexdigest()
            images = (ImageInput(key, query.pixels),)
        request = GenerationRequest(
            input_ids=prompt.input_ids,
            image_mask=prompt.image_mask,
            images=images,
            # The engine refuses a prompt that leaves no room for an answer.
            max_new_tokens=max(1, min(query.max_new_tokens, room)),
            temperature=query.temperature,
            top_p=query.top_p,
            seed=query.seed,
            stop=(self.template.stop,),
            logprobs=query.logprobs,
            request_id=query.id,
        )
        return self.engine.submit(request)


class Conversation:
    """A conversation about at most one image. Answers are remembered."""

    def __init__(self, inference: Inference, pixels: np.ndarray | None = None, *, max_new_tokens: int = 256) -> None:
        self.inference = inference
        self.pixels = pixels
        self.max_new_tokens = max_new_tokens
        self.turns: list[Turn] = []

    def ask(self, question: str, *, temperature: float = 0.0) -> Iterator[str]:
        """Yield the answer piece by piece. The turn is remembered once the answer is complete.

        Raises:
            UserError: the conversation no longer fits the engine's context.
        """
        first = not self.turns
        turns = [*self.turns, user_turn(question, has_image=first and self.pixels is not None)]
        pieces = []
        query = Query(turns, self.pixels, max_new_tokens=self.max_new_tokens, temperature=temperature)
        try:
            for piece in self.inference.stream(query):
                pieces.append(piece)
                yield piece
        except PromptTooLongError as error:
            context = self.inference.engine.max_context
            raise UserError(f"{error}; raise engine.max_context={context}, or start a new conversation") from None
        self.turns = [*turns, Turn("assistant", "".join(pieces).strip())]


def open_conversation(
    run: Run,
    pixels: np.ndarray | None,
    *,
    question: str | None = None,
    max_new_tokens: int = 256,
    engine: Mapping[str, Any] | None = None,
    own_weights: bool = False,
) -> Conversation:
    """Build a conversation and its engine; enter ``conversation.inference`` before asking.

    Args:
        own_weights: the run's model is used for nothing else, which saves memory; see ``EngineSettings``.
        question: the only question that will be asked, so the KV cache holds only this one. None: the cache holds
            ``max_length`` of the run plus one answer.
    """
    num_prompt = run.manifest.max_length
    if question is not None:
        turns = [user_turn(question, has_image=pixels is not None)]
        num_prompt = len(_encode(turns, None, run.manifest.template, run.tokenizer, run.model.num_patches))
    parts, num_tokens = (run.model, run.tokenizer, run.manifest), num_prompt + max_new_tokens
    inference = Inference(*parts, num_tokens=num_tokens, engine=engine, own_weights=own_weights)
    return Conversation(inference, pixels, max_new_tokens=max_new_tokens)


def _encode(
    turns: Sequence[Turn], system: str | None, template: str, tokenizer: PreTrainedTokenizerBase, num_patches: int
) -> Example:
    return encode(render_prompt(turns, get_template(template), system=system), tokenizer, num_patches)


def _wait(handle: GenerationHandle | Answer) -> Answer:
    if isinstance(handle, Answer):
        return handle
    logprobs: list[TokenLogprob] = []
    for event in handle:
        if isinstance(event, Delta):
            logprobs += event.logprobs
    finished = handle.result()
    return Answer(finished.text.strip(), finished.finish_reason, finished.usage.completion_tokens, tuple(logprobs))
