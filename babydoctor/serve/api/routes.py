"""Routes that controller and worker share: operators' routes, the LLaVA API, FastChat's additions, OpenAI's APIs.

They call a ``Backend``: a worker's engine, or a controller that chooses a worker.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from babydoctor.serve.api.backend import Backend
from babydoctor.serve.api.certainty import open_answer
from babydoctor.serve.api.docs import WORK_ERRORS, errors, reply
from babydoctor.serve.api.errors import ERROR_NO_WORKER, ERROR_UNREACHABLE, OVERFLOW, ApiError
from babydoctor.serve.api.fastchat import conversation_fields, with_own_placeholders
from babydoctor.serve.api.llava_stream import ERROR_HEADER, STREAM_TYPE, LlavaWriter
from babydoctor.serve.api.openai.routes import add_openai_routes
from babydoctor.serve.api.protocol import (
    AttentionReply,
    AttentionRequest,
    CountTokenRequest,
    GenerateRequest,
    ModelRequest,
)
from babydoctor.serve.api.responses import CollectedAnswer, StreamedAnswer, WorkResponse
from babydoctor.serve.api.streaming import AnswerDelta, start_opening
from babydoctor.serve.metrics import CONTENT_TYPE


def add_common_routes(app: FastAPI, backend: Backend) -> None:
    """Add the routes that do not depend on the kind of backend."""
    _add_operator_routes(app, backend)
    _add_llava_routes(app, backend)
    _add_fastchat_routes(app, backend)
    add_openai_routes(app, backend)


def _add_operator_routes(app: FastAPI, backend: Backend) -> None:
    @app.get("/healthz", tags=["operators"])
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/health", tags=["operators"], responses=errors(503))
    @app.get("/readyz", tags=["operators"], responses=errors(503))
    async def readyz() -> dict[str, str]:
        """200 if the server can answer requests, else 503 with the reason. `/health` is vLLM's name for it."""
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
    stream_docs: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "JSON objects, each followed by a NUL byte. `text` is the prompt and all text so far.",
            "content": {STREAM_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    }

    @app.post(
        "/worker_generate_stream", tags=["LLaVA"], response_class=Response, responses=stream_docs | errors(*WORK_ERRORS)
    )
    async def worker_generate_stream(body: GenerateRequest) -> Response:
        """Answer a prompt as a stream."""
        writer = LlavaWriter(body.prompt if body.echo else "", token_ids=body.token_ids)
        try:
            opening = await start_opening(open_answer(backend, with_own_placeholders(body)))
        except ApiError as error:
            # LLaVA's clients read these errors from the stream. All other refusals are HTTP statuses.
            if error.code != OVERFLOW and error.error_code not in (ERROR_NO_WORKER, ERROR_UNREACHABLE):
                raise
            message = writer.encode(AnswerDelta(error=error))
            return Response(message, headers={ERROR_HEADER: error.code}, media_type=STREAM_TYPE)
        return StreamedAnswer(opening, writer.encode, backend.settings.limits, media_type=STREAM_TYPE)

    @app.post(
        "/worker_attention",
        tags=["LLaVA"],
        response_class=Response,
        responses={
            200: {
                "description": "With `stream`: objects of AttentionProgress, then the reply, a NUL byte after each.",
                "model": AttentionReply,
                "content": {STREAM_TYPE: {"schema": {"type": "string", "format": "binary"}}},
            },
            **errors(*WORK_ERRORS),
        },
    )
    async def worker_attention(body: AttentionRequest) -> Response:
        """On which parts of the image each piece of an answer depended. A client that disconnects ends the work."""
        return WorkResponse(backend.attention(body), is_streamed=body.stream)


def _add_fastchat_routes(app: FastAPI, backend: Backend) -> None:
    @app.post(
        "/worker_generate",
        tags=["FastChat"],
        response_class=Response,
        responses=reply("GeneratedText", "The whole answer") | errors(*WORK_ERRORS),
    )
    async def worker_generate(body: GenerateRequest) -> Response:
        """Answer a prompt in one reply."""
        writer = LlavaWriter(body.prompt if body.echo else "", token_ids=body.token_ids)
        opening = await start_opening(open_answer(backend, with_own_placeholders(body)))
        return CollectedAnswer(opening, lambda answers: writer.document(answers[0]), backend.settings.limits)

    @app.post("/count_token", tags=["FastChat"], responses=errors(*WORK_ERRORS))
    async def count_token(body: CountTokenRequest) -> dict[str, int]:
        """Number of tokens of a prompt, including images."""
        return {"count": await backend.count_tokens(body), "error_code": 0}

    @app.post("/worker_get_conv_template", tags=["FastChat"], responses=errors(*WORK_ERRORS))
    async def worker_get_conv_template(body: ModelRequest | None = None) -> dict[str, Any]:
        """The conversation template with the fields of FastChat's `Conversation`."""
        return {"conv": conversation_fields(backend.template(body.model if body else ""))}

    @app.post("/model_details", tags=["FastChat"], responses=errors(*WORK_ERRORS))
    async def model_details(body: ModelRequest | None = None) -> dict[str, Any]:
        """Properties of a model: context length, image grid, template."""
        return await backend.model_details(body.model if body else "")
