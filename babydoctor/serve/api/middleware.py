"""Middleware around all routes: request id, API key, size of the body, and one log line per request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from babydoctor.serve.api.admission import Keys, bearer_key, check_json_shape, check_json_text
from babydoctor.serve.api.docs import DOCS_FILES
from babydoctor.serve.api.errors import ApiCode, ApiError
from babydoctor.serve.api.origins import OriginCheck
from babydoctor.serve.api.responses import error_response
from babydoctor.serve.api.shape_errors import shape_error
from babydoctor.serve.logs import REQUEST_ID, log, new_request_id
from babydoctor.serve.metrics import HttpMetrics
from babydoctor.serve.settings import Limits

logger = logging.getLogger(__name__)

MAX_OPEN_BODY_BYTES = 2**17
"""Limit for requests that need no client's key, such as registrations and heartbeats."""

QUIET_PATHS = frozenset({"/healthz", "/health", "/readyz", "/metrics", "/receive_heart_beat", "/worker_get_status"})
"""Paths that machines poll. They are logged only on errors."""


class Gate:
    """ASGI middleware around a whole application.

    Args:
        keys: clients must send one of these; empty: no key is needed.
        open_paths: answered without a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        open_paths: Collection[str],
        limits: Limits,
        metrics: HttpMetrics,
        origins: OriginCheck,
    ) -> None:
        self.app = app
        self.keys = keys
        self.open_paths = frozenset(open_paths)
        self.limits = limits
        self.origins = origins
        self.metrics = metrics
        self.held_bytes = 0
        metrics.gauge("held_bytes", "Bytes of request bodies in memory", lambda: self.held_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = new_request_id(headers.get(b"x-request-id", b"").decode("latin-1"))
        token = REQUEST_ID.set(request_id)
        started_s, status = time.monotonic(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._pass(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            duration_s = time.monotonic() - started_s
            self.metrics.observe(route, status, duration_s)
            if route not in QUIET_PATHS or status >= 400:
                level = logging.WARNING if status >= 500 else logging.INFO
                fields = {"method": scope["method"], "route": route, "status": status}
                log(logger, level, "request", **fields, duration_ms=round(1000 * duration_s))
            REQUEST_ID.reset(token)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = _Held(self)
        try:
            self.origins.check(scope["headers"])
            if (
                self.keys
                and scope["path"] not in self.open_paths
                and not scope["path"].startswith(DOCS_FILES)
                and not self.keys.accepts(bearer_key(scope["headers"]))
            ):
                raise ApiError("bad_key", "This server needs an API key: send 'Authorization: Bearer KEY'.")
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self._read_body(receive, held, scope["path"])
                _with_json_type(scope)
                receive = _receive_again(body, receive)
                del body
        except ApiError as error:
            held.release()
            return await error_response(error, scope["path"])(scope, receive, send)
        except BaseException:
            held.release()
            raise
        try:
            await self.app(scope, receive, send)
        finally:
            held.release()

    async def _read_body(self, receive: Receive, held: _Held, path: str) -> bytes:
        """Read the body within its limits and check its JSON shape.

        Raises:
            ApiError: 408, 413, 422, or 429 if all open requests together are too large.
        """
        limit = self.limits.max_body_bytes
        if path in self.open_paths:  # anyone may send to these paths
            limit = min(limit, MAX_OPEN_BODY_BYTES)
        parts: list[bytes] = []
        size, more = 0, True
        deadline = time.monotonic() + self.limits.body_timeout_s
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except (TimeoutError, asyncio.TimeoutError):
                if size > limit:
                    break
                raise ApiError(
                    "body_timeout", f"The body did not arrive within {self.limits.body_timeout_s:g} s."
                ) from None
            if message["type"] == "http.disconnect":
                raise ApiError("client_left", "The connection ended before the body did.")
            chunk = message.get("body", b"")
            size += len(chunk)
            more = message.get("more_body", False)
            if size <= limit:
                parts.append(chunk)
                held.add(len(chunk))
            else:
                # Keep reading and discard the rest, so that the client finishes sending and sees the error.
                parts.clear()
                held.release()
                if size > 4 * limit:
                    break
        if size > limit:
            raise ApiError("body_too_large", f"The request is larger than this server's limit of {limit} bytes.")
        body = b"".join(parts)
        check_json_shape(body)
        check_json_text(body)
        return body


class _Held:
    """Counts the bytes of one request's body in memory while they arrive."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that arrived.

        Raises:
            ApiError: 429 if the bodies of all requests together are too large.
        """
        self._num_bytes += num_bytes
        self._gate.held_bytes += num_bytes
        if self._gate.held_bytes > self._gate.limits.max_held_bytes:
            raise ApiError("queue_full", "The server is busy. Please try again soon.")

    def release(self) -> None:
        self._gate.held_bytes -= self._num_bytes
        self._num_bytes = 0


def _receive_again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that first returns a body that was already read."""
    left: list[bytes] = [body]

    async def receive_again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return receive_again


_HTTP_CODES: dict[int, ApiCode] = {404: "not_found", 405: "method_not_allowed"}


def add_error_handlers(app: FastAPI) -> None:
    """Send every error as ``ApiError.body()``. No error repeats a whole prompt or image."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_validation_error(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(_http_error(error), request.url.path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        message = "The server failed at this request; its log says where."
        return error_response(ApiError("internal", message), request.url.path)


def _validation_error(error: RequestValidationError) -> ApiError:
    """An error with field and reason. FastAPI's default would repeat the input, for example a whole image."""
    items = error.errors()
    if items[0]["type"] != "json_invalid":
        return shape_error(items, error.body)
    position, text = int(items[0]["loc"][-1]), str(error.body)
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    reason = items[0].get("ctx", {}).get("error", "not valid JSON")
    return ApiError("bad_json", f"The body is not valid JSON: {reason}, at line {line}, column {column}.")


def _http_error(error: HTTPException) -> ApiError:
    if error.status_code == 400 and isinstance(error.__cause__, ValueError):
        # FastAPI could not parse the body, for another reason than JSON syntax.
        fault = error.__cause__
        reason = "it is not UTF-8" if isinstance(fault, UnicodeError) else "a number has too many digits"
        return ApiError("bad_json", f"The body is not valid JSON: {reason}.")
    return ApiError(_HTTP_CODES.get(error.status_code, "http_error"), str(error.detail))


def _with_json_type(scope: Scope) -> None:
    """Treat a body without a Content-Type as JSON, like LLaVA's servers do. OpenAI's API requires the header."""
    is_llava = not scope["path"].startswith("/v1/")
    if is_llava and not any(name == b"content-type" and value.strip() for name, value in scope["headers"]):
        scope["headers"] = [*scope["headers"], (b"content-type", b"application/json")]
