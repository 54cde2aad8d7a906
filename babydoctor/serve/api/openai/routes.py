"""Routes of OpenAI's APIs: models, chat completions, completions and stateless responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from babydoctor.serve.api.backend import Backend
from babydoctor.serve.api.certainty import open_answer
from babydoctor.serve.api.docs import WORK_ERRORS, errors, reply
from babydoctor.serve.api.errors import model_not_found
from babydoctor.serve.api.openai import chat
from babydoctor.serve.api.openai import completions as plain_completions
from babydoctor.serve.api.openai import responses as stateless
from babydoctor.serve.api.openai.common import DONE
from babydoctor.serve.api.protocol import GenerateRequest
from babydoctor.serve.api.remote_image import fetch_image
from babydoctor.serve.api.responses import CollectedAnswer, StreamedAnswer
from babydoctor.serve.api.streaming import AnswerDelta, open_all, start_opening
from babydoctor.serve.logs import REQUEST_ID


class ModelCard(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "babydoctor"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Writer(Protocol):
    """Deltas -> one of OpenAI's forms."""

    def event(self, delta: AnswerDelta | None) -> bytes: ...

    def document(self, answers: Sequence[AnswerDelta]) -> dict[str, Any]: ...


def add_openai_routes(app: FastAPI, backend: Backend) -> None:
    """Add everything under ``/v1``."""

    async def fetch(url: str) -> bytes:
        return await fetch_image(url, backend.settings.remote_images)

    async def answer(requests: list[GenerateRequest], writer: Writer, stream: bool | None, trailer: bytes) -> Response:
        opening = await start_opening(open_all([open_answer(backend, request) for request in requests]))
        limits = backend.settings.limits
        if not stream:
            return CollectedAnswer(opening, writer.document, limits, num_answers=len(requests))
        return StreamedAnswer(opening, writer.event, limits, media_type="text/event-stream", trailer=trailer)

    @app.get("/v1/models", tags=["OpenAI"], responses=errors(401))
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name) for name in backend.model_names()])

    @app.get("/v1/models/{model}", tags=["OpenAI"], responses=errors(401, 404, 400))
    async def model(model: str) -> ModelCard:
        if model not in (names := backend.model_names()):
            raise model_not_found(model, names)
        return ModelCard(id=model)

    post = _poster(app)

    @post("/v1/chat/completions", reply("ChatCompletion", "The completion", streams=True))
    async def chat_completions(body: chat.ChatRequest) -> Response:
        """Answer messages; with `stream: true` as server-sent events."""
        requests = await chat.to_generate(body, backend.template(body.model), fetch)
        return await answer(requests, chat.ChatWriter(body, REQUEST_ID.get() or ""), body.stream, DONE)

    @post("/v1/completions", reply("Completion", "The completion", streams=True))
    async def completions(body: plain_completions.CompletionRequest) -> Response:
        """Continue a text without a template; with `stream: true` as server-sent events."""
        requests = plain_completions.to_generate(body)
        writer = plain_completions.CompletionWriter(body, REQUEST_ID.get() or "")
        return await answer(requests, writer, body.stream, DONE)

    @post("/v1/responses", reply("ModelResponse", "The response", streams=True))
    async def responses(body: stateless.ResponsesRequest) -> Response:
        """Answer a conversation; nothing is stored, so `previous_response_id` is refused."""
        requests = await stateless.to_generate(body, backend.template(body.model), fetch)
        writer = stateless.ResponseWriter(body, REQUEST_ID.get() or "")
        return await answer(requests, writer, body.stream, b"")


def _poster(app: FastAPI) -> Callable[[str, dict[int | str, dict[str, Any]]], Callable[[Any], Any]]:
    def post(path: str, replies: dict[int | str, dict[str, Any]]) -> Callable[[Any], Any]:
        return app.post(path, tags=["OpenAI"], response_class=Response, responses=replies | errors(*WORK_ERRORS))

    return post
