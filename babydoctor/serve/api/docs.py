"""The OpenAPI document and ``/docs``: error and reply schemas, security schemes, Swagger UI without the internet.

Hospital networks seldom reach a CDN, so ``fastapi-offline`` serves the files of Swagger UI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from babydoctor import __version__

DOCS_FILES = "/docs-files/"

OPEN_PATHS = ("/healthz", "/readyz", "/health", "/docs", "/openapi.json")
"""Paths that need no key, like everything under ``DOCS_FILES``."""

_DESCRIPTIONS = {
    400: "The body cannot be parsed. On /v1 also: a field is wrong; the message names it",
    401: "No valid API key",
    403: "No valid registration secret",
    404: "No such model; the message lists the models that exist",
    408: "The body did not arrive in time",
    413: "Body or image too large",
    422: "A field is wrong; the message names it",
    429: "Busy; Retry-After says when to try again",
    500: "The server failed",
    503: "No worker can answer now",
    504: "The answer took too long",
}


def _object(optional: Mapping[str, dict[str, Any]] | None = None, **required: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with required and optional properties."""
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_MAYBE_OBJECT = {"type": ["object", "null"]}
_ERROR_SCHEMA = _object(
    error=_object(message=_STRING, type=_STRING, code=_STRING, param={"type": ["string", "null"]}),
    text=_STRING,
    error_code=_INTEGER,
)

BODY_ERRORS = (400, 401, 408, 413, 422, 500)
WORK_ERRORS = (*BODY_ERRORS, 404, 429, 503, 504)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a route's errors."""
    content = {"application/json": {"schema": _ERROR_SCHEMA}}
    return {status: {"description": _DESCRIPTIONS[status], "content": content} for status in statuses}


def reply(name: str, description: str, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a reply whose schema is ``REPLY_SCHEMAS[name]``, and of its stream."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": description, "content": content}}


_FINISH = {"type": "string", "enum": ["stop", "length"]}
_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER) | _MAYBE_OBJECT
_MESSAGE = _object(optional={"refusal": {"type": "null"}}, role={"const": "assistant"}, content=_STRING)


def _completion(kind: str, **answer: dict[str, Any]) -> dict[str, Any]:
    """A completion of OpenAI's API, whose choices hold ``answer``."""
    return _object(
        id=_STRING,
        object={"const": kind},
        created=_INTEGER,
        model=_STRING,
        choices=_list(_object(optional={"logprobs": _MAYBE_OBJECT}, index=_INTEGER, **answer, finish_reason=_FINISH)),
        usage=_USAGE,
    )


REPLY_SCHEMAS: dict[str, dict[str, Any]] = {
    "ChatCompletion": _completion("chat.completion", message=_MESSAGE),
    "Completion": _completion("text_completion", text=_STRING),
    "ModelResponse": _object(
        id=_STRING,
        object={"const": "response"},
        created_at=_INTEGER,
        status={"type": "string", "enum": ["completed", "incomplete"]},
        model=_STRING,
        output=_list({"type": "object"}),
        usage=_MAYBE_OBJECT,
    ),
    "GeneratedText": _object(text=_STRING, error_code=_INTEGER, optional={"finish_reason": _FINISH, "usage": _USAGE}),
}

_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, if the server requires one."},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}


def build_app(
    title: str, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]], *, has_keys: bool
) -> FastAPI:
    """Build an application with ``/docs``. Its OpenAPI document says whether keys are needed."""
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        static_url=DOCS_FILES.rstrip("/"),
        title=title,
        version=__version__,
        description="LLaVA's protocol, FastChat's additions and OpenAI's APIs. Research use only.",
        lifespan=lifespan,
    )
    build_document = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build_document()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(REPLY_SCHEMAS)
            components["securitySchemes"] = _SECURITY_SCHEMES
            # An empty requirement means that keys are optional.
            document["security"] = [{"bearer": []}, {"api_key": []}, *([] if has_keys else [{}])]
            for path in OPEN_PATHS:
                for operation in document["paths"].get(path, {}).values():
                    operation["security"] = []
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app
