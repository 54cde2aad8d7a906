"""The routes that controller and worker have in common: LLaVA's wire, FastChat's additions, OpenAI's API.

Behind them stands a ``Backend``: a worker's engine, or a controller's choice of workers.
"""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import FastAPI, Request
from starlette.responses import Response

from babydoctor.conversation import Template
from babydoctor.serve.api.docs import add_docs
from babydoctor.serve.api.errors import ERROR_NO_WORKER, ERROR_NONE, ERROR_UNREACHABLE, OVERFLOW, ApiError
from babydoctor.serve.api.openai import DONE, ChatRequest, CompletionWriter, ModelCard, ModelList, to_generate
from babydoctor.serve.api.protocol import (
    OVERFLOW_NOTICE,
    AttentionReply,
    AttentionRequest,
    Chunk,
    CountTokenRequest,
    GenerateRequest,
    ModelRequest,
    encode_chunk,
)
from babydoctor.serve.api.remote_image import fetch_image
from babydoctor.serve.api.streaming import Answer, AnswerResponse, CollectedAnswer, StreamedAnswer, start_opening
from babydoctor.serve.logs import REQUEST_ID
from babydoctor.serve.metrics import CONTENT_TYPE, HttpMetrics
from babydoctor.serve.settings import ServeSettings

ERROR_HEADER = "x-babydoctor-error"
"""Names the error of a stream that begins with HTTP 200, so that a controller need not read into it."""

STREAM_TYPE = "application/octet-stream"

OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json")


class Backend(Protocol):
    """What answers the requests."""

    @property
    def settings(self) -> ServeSettings: ...

    @property
    def metrics(self) -> HttpMetrics: ...

    def model_names(self) -> list[str]: ...

    def template(self, model: str) -> Template:
        """The template of a model. Raises ``ApiError`` where nobody serves it."""

    def unready(self) -> str | None:
        """Why no request can be answered now; None where one can."""

    async def open(self, request: GenerateRequest) -> Answer:
        """Begin an answer. Raises ``ApiError``. Cancelling it gives everything back."""

    async def attention(self, request: AttentionRequest) -> dict[str, Any]: ...

    async def count_tokens(self, request: CountTokenRequest) -> int: ...

    async def model_details(self, model: str) -> dict[str, Any]: ...


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error", "text", "error_code"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "string"},
                "param": {"type": ["string", "null"]},
            },
        },
        "text": {"type": "string"},
        "error_code": {"type": "integer"},
    },
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of a route's errors."""
    described = {
        400: "The body could not be parsed",
        401: "No valid API key",
        403: "No valid registration secret",
        404: "No such model",
        408: "The body came too slowly",
        413: "Body or image too large",
        422: "A field is wrong; the message names it",
        429: "Busy; Retry-After says when to come back",
        500: "The server failed",
        503: "No worker can answer now",
        504: "The answer took too long",
    }
    content = {"application/json": {"schema": _ERROR_SCHEMA}}
    return {status: {"description": described[status], "content": content} for status in statuses}


BODY_ERRORS = (400, 401, 408, 413, 422, 500)
WORK_ERRORS = (*BODY_ERRORS, 404, 429, 503, 504)


def add_common_routes(app: FastAPI, backend: Backend) -> None:
    """Add everything that does not depend on who stands behind."""
    add_docs(app)
    _add_operator_routes(app, backend)
    _add_llava_routes(app, backend)
    _add_fastchat_routes(app, backend)
    _add_openai_routes(app, backend)


def _add_operator_routes(app: FastAPI, backend: Backend) -> None:
    @app.get("/healthz", tags=["operators"])
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operators"], responses=errors(503))
    async def readyz() -> dict[str, str]:
        """A request could be answered now; 503 with the reason where not."""
        if (reason := backend.unready()) is not None:
            raise ApiError("not_ready", reason)
        return {"status": "ready"}

    @app.get(
        "/metrics",
        tags=["operators"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors(401)},
    )
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(backend.metrics.render(), media_type=CONTENT_TYPE)


def _add_llava_routes(app: FastAPI, backend: Backend) -> None:
    limits = backend.settings.limits
    stream_docs: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "JSON objects, a NUL byte after each; `text` is the prompt and all that came so far.",
            "content": {STREAM_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    }

    @app.post(
        "/worker_generate_stream", tags=["LLaVA"], response_class=Response, responses=stream_docs | errors(*WORK_ERRORS)
    )
    async def worker_generate_stream(body: GenerateRequest) -> Response:
        """Answer a prompt, streaming."""
        front = body.prompt if body.echo else ""
        last = Chunk(front)

        def encode(chunk: Chunk | None) -> bytes:
            # In silence the last text is sent again: the original's clients know no other sign of life.
            nonlocal last
            if chunk is None:
                return encode_chunk(Chunk(last.text))
            if chunk.error_code == ERROR_NONE:
                last = chunk = chunk.with_text(front + chunk.text)
            return encode_chunk(chunk, token_ids=body.token_ids)

        try:
            opening = await start_opening(backend.open(body))
        except ApiError as error:
            if error.code == OVERFLOW:
                chunk = Chunk(front + OVERFLOW_NOTICE, finish_reason="length", code=OVERFLOW)
            elif error.error_code in (ERROR_NO_WORKER, ERROR_UNREACHABLE):
                chunk = Chunk.of_error(error)
            else:
                raise
            return Response(encode_chunk(chunk), headers={ERROR_HEADER: error.code}, media_type=STREAM_TYPE)
        return StreamedAnswer(
            opening,
            encode,
            media_type=STREAM_TYPE,
            timeout_s=limits.request_timeout_s,
            tick_s=limits.keep_alive_s,
        )

    @app.post("/worker_attention", tags=["LLaVA"], responses=errors(*WORK_ERRORS))
    async def worker_attention(body: AttentionRequest) -> AttentionReply:
        """Where on the image each piece of a given answer looked."""
        return AttentionReply.model_validate(await backend.attention(body))


def _add_fastchat_routes(app: FastAPI, backend: Backend) -> None:
    limits = backend.settings.limits

    @app.post("/worker_generate", tags=["FastChat"], responses=errors(*WORK_ERRORS), response_model=None)
    async def worker_generate(body: GenerateRequest) -> AnswerResponse:
        """Answer a prompt, all at once."""
        front = body.prompt if body.echo else ""
        return CollectedAnswer(
            await start_opening(backend.open(body)),
            lambda chunk: chunk.with_text(front + chunk.text).to_json(token_ids=body.token_ids),
            timeout_s=limits.request_timeout_s,
            tick_s=limits.keep_alive_s,
        )

    @app.post("/count_token", tags=["FastChat"], responses=errors(*WORK_ERRORS))
    async def count_token(body: CountTokenRequest) -> dict[str, int]:
        """How many positions a prompt takes, images included."""
        return {"count": await backend.count_tokens(body), "error_code": 0}

    @app.post("/worker_get_conv_template", tags=["FastChat"], responses=errors(*WORK_ERRORS))
    async def worker_get_conv_template(body: ModelRequest | None = None) -> dict[str, Any]:
        """The conversation template, with the names of FastChat's fields where it has them."""
        template = backend.template(body.model if body else "")
        fields = {
            "name": template.name,
            "system_message": template.system,
            "stop_str": template.stop,
            "opening": template.opening,
            "next_opening": template.next_opening,
            "reply_cue": template.reply_cue,
        }
        return {"conv": fields}

    @app.post("/model_details", tags=["FastChat"], responses=errors(*WORK_ERRORS))
    async def model_details(body: ModelRequest | None = None) -> dict[str, Any]:
        """What a client has to know of a model: context length, image grid, template."""
        return await backend.model_details(body.model if body else "")


def _add_openai_routes(app: FastAPI, backend: Backend) -> None:
    limits = backend.settings.limits

    @app.get("/v1/models", tags=["OpenAI"], responses=errors(401))
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name) for name in backend.model_names()])

    @app.get("/v1/models/{model}", tags=["OpenAI"], responses=errors(401, 404, 422))
    async def model(model: str) -> ModelCard:
        if model not in backend.model_names():
            raise ApiError("model_not_found", "This server does not serve that model.", param="model")
        return ModelCard(id=model)

    @app.post(
        "/v1/chat/completions",
        tags=["OpenAI"],
        response_class=Response,
        responses={
            200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The completion"},
            **errors(*WORK_ERRORS),
        },
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer messages; with `stream: true` as server-sent events."""

        async def fetch(url: str) -> bytes:
            return await fetch_image(url, backend.settings.remote_images)

        generate = await to_generate(body, backend.template(body.model), fetch)
        opening = await start_opening(backend.open(generate))
        writer = CompletionWriter(body, REQUEST_ID.get() or "")
        if not body.stream:
            return CollectedAnswer(
                opening, writer.document, timeout_s=limits.request_timeout_s, tick_s=limits.keep_alive_s
            )
        return StreamedAnswer(
            opening,
            writer.event,
            media_type="text/event-stream",
            timeout_s=limits.request_timeout_s,
            tick_s=limits.keep_alive_s,
            trailer=DONE,
        )
