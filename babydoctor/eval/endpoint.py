"""Ask any OpenAI-compatible server the questions of a task: another model's, or our own over its API.

Each question is one chat request with the decoded picture as PNG, so the server does its own preprocessing.
"""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from babydoctor.engine.request import TokenLogprob
from babydoctor.eval.ask import (
    TOP_LOGPROBS,
    GenerationConfig,
    Prediction,
    answer_confidence,
)
from babydoctor.eval.conditions import ConditionedFiles
from babydoctor.eval.tasks import Question
from babydoctor.schema import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_S = 300.0
RETRIES = 8
"""Retries of a request that the server could not take: connection lost, 408, 409, 429 or 5xx. The waits grow to 8
seconds, or are the server's ``Retry-After``."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server. ``url`` is the base of its API and ends in ``/v1``; ``model`` is the name that it serves."""

    url: str
    model: str


class EndpointClient:
    """Asks one server, from several threads. The key is read from ``OPENAI_API_KEY``.

    Raises:
        UserError: the openai package is missing, or the server does not answer or serves another model.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("--endpoint needs the openai package; run pip install 'babydoctor[endpoint]'") from error
        self.endpoint = endpoint
        self._openai = openai
        key = os.environ.get(KEY_VARIABLE) or "none"
        self._client = openai.OpenAI(base_url=endpoint.url, api_key=key, timeout=TIMEOUT_S, max_retries=RETRIES)
        self._gives_logprobs = True
        self._check_model()

    def _check_model(self) -> None:
        try:
            served = [model.id for model in self._client.with_options(max_retries=2).models.list()]
        except self._openai.APIStatusError as error:
            raise self._refused(error) from error
        except self._openai.APIConnectionError as error:
            raise self._unreachable() from error
        if served and self.endpoint.model not in served:
            names = ", ".join(map(repr, served[:10]))
            raise UserError(f"--model {self.endpoint.model!r}: {self.endpoint.url} serves {names}")

    def answer(self, question: Question, image: bytes | None, config: GenerationConfig) -> Prediction:
        """The answer to one question. A question that the server refuses becomes a prediction with an error.

        Args:
            image: a PNG file, or None for a question without an image.

        Raises:
            UserError: the server is gone, or refuses every question.
        """
        wants_logprobs = self._gives_logprobs and bool(question.yes_no_reference)
        try:
            return self._ask(question, image, config, wants_logprobs)
        except self._openai.BadRequestError as error:
            if not wants_logprobs:
                return _failed(question, error)
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                raise self._refused(error) from error
            return _failed(question, error)
        except self._openai.APIConnectionError as error:
            raise self._unreachable() from error
        # Not every server knows log probabilities; without them the yes/no answers have no confidence.
        try:
            prediction = self._ask(question, image, config, False)
        except self._openai.APIStatusError as error:
            return _failed(question, error)
        self._gives_logprobs = False
        return prediction

    def _ask(self, question: Question, image: bytes | None, config: GenerationConfig, logprobs: bool) -> Prediction:
        # Without an image, plain text: servers of text models, such as llama-cpp-python's, do not all read parts.
        content: str | list[dict[str, Any]] = question.prompt
        if image is not None:
            url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question.prompt},
            ]
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {}
        response = self._client.chat.completions.create(
            model=self.endpoint.model,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
            max_tokens=config.longest(question),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed_of(question) % 2**31,
            **options,
        )
        choice = response.choices[0]
        text = (choice.message.content or "").strip()
        tokens = [] if choice.logprobs is None else choice.logprobs.content or []
        given = [
            TokenLogprob(
                0, token.token, token.logprob, tuple((0, top.token, top.logprob) for top in token.top_logprobs)
            )
            for token in tokens
        ]
        num_tokens = response.usage.completion_tokens if response.usage else 0
        return Prediction(question.id, text, answer_confidence(text, given), choice.finish_reason or "", num_tokens)

    def _refused(self, error: Any) -> UserError:
        hints = {401: f"set {KEY_VARIABLE}", 403: f"check {KEY_VARIABLE}", 404: "is it the URL that ends in /v1?"}
        hint = hints.get(error.status_code, "see the server's log")
        return UserError(f"--endpoint {self.endpoint.url} answers {error.status_code} ({_message(error)}); {hint}")

    def _unreachable(self) -> UserError:
        return UserError(
            f"--endpoint {self.endpoint.url} does not answer. The answers so far are kept: run the command again when "
            "the server is up"
        )


def ask_endpoint(
    client: EndpointClient,
    questions: Sequence[Question],
    images: ConditionedFiles,
    config: GenerationConfig,
) -> Iterator[Prediction]:
    """Yield the predictions as they arrive, ``config.batch_size`` requests at a time.

    Raises:
        UserError: see ``EndpointClient.answer``; requests that have not begun are dropped.
    """
    stopped = threading.Event()

    def answer(question: Question) -> Prediction | None:
        return None if stopped.is_set() else client.answer(question, images.image(question), config)

    with ThreadPoolExecutor(max_workers=config.batch_size) as threads:
        try:
            for future in as_completed([threads.submit(answer, question) for question in questions]):
                prediction = future.result()
                assert prediction is not None
                yield prediction
        finally:
            stopped.set()


def _failed(question: Question, error: Any) -> Prediction:
    return Prediction(question.id, "", None, f"error {error.status_code}: {_message(error)}")


def _message(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)[:300]
