"""Restrict Gradio's HTTP routes to those that the web UI uses, and check the calls.

Gradio answers a malformed call with status 500 and a stack trace in the log. This middleware answers with an error
message. The routes that the web UI does not use (queue, named functions, uploads, proxies) return 404.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from babydoctor.serve.api.admission import check_json_shape, check_json_text
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.shape_errors import describe

GRADIO_API = "/gradio_api/"

RUN = f"{GRADIO_API}run/predict"
"""The route that calls event handlers. A tab uses no other, because Gradio's queue is off."""

USED = tuple(GRADIO_API + name for name in ("info", "heartbeat/", "startup-events", "app_id", "user", "file="))

MAX_CALL_BYTES = 2**20
"""Enough for a question and a few settings. Files go to ``/page/upload``."""

_FIELDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "data": (list, "a list"),
    "fn_index": (int, "an integer"),
    "session_hash": (str, "a string"),
    "trigger_id": ((int, type(None)), "an integer or null"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e12


_STRING: tuple[str, Callable[[Any], bool]] = ("a string", lambda value: isinstance(value, str))
_ANYTHING: tuple[str, Callable[[Any], bool]] = ("a value", lambda value: True)
_NUMBER: tuple[str, Callable[[Any], bool]] = ("a number of ordinary size", _is_number)
_VALUES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "textbox": _STRING,
    "dropdown": _STRING,
    "radio": _STRING,
    "slider": _NUMBER,
    "number": _NUMBER,
    "checkbox": ("true or false", lambda value: isinstance(value, bool)),
    "checkboxgroup": (
        "a list of strings",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
}
"""Values that each kind of component sends; null if nothing is chosen. Gradio's own checks are off, see ``events``."""


class GradioRoutes:
    """ASGI middleware around the application that holds Gradio.

    Args:
        inputs: number of an event handler -> the kinds of its input components.
    """

    def __init__(self, app: ASGIApp, *, inputs: Mapping[int, Sequence[str]]) -> None:
        self.app = app
        self.inputs = inputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith(GRADIO_API):
            return await self.app(scope, receive, send)
        try:
            if path != RUN and not path.startswith(USED):
                raise ApiError("not_found", "The web UI has no such path.")
            if path == RUN:
                if scope["method"] != "POST":
                    raise ApiError("method_not_allowed", "Events of the web UI are sent with POST.")
                receive = _again(await self._read_call(Request(scope, receive)), receive)
                headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope["headers"] = [*headers, (b"content-type", b"application/json")]
        except ApiError as error:
            return await JSONResponse(error.body(), error.status)(scope, receive, send)
        await self.app(scope, receive, send)

    async def _read_call(self, request: Request) -> bytes:
        """The body of a call, checked.

        Raises:
            ApiError: the body is malformed. The message names the field.
        """
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_CALL_BYTES:
                raise ApiError("body_too_large", f"A call of the web UI has at most {MAX_CALL_BYTES} bytes.")
        check_json_shape(body)
        check_json_text(body)
        try:
            call = json.loads(body)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8, or a number is too long"
            raise ApiError("bad_json", f"The body is not valid JSON: {reason}.") from None
        self._check(call)
        # Pass on only these fields. Gradio accepts more, among them one that replaces the whole request. Event data is
        # checked by the handlers that use it.
        return json.dumps({name: call.get(name) for name in (*_FIELDS, "event_data")}).encode()

    def _check(self, call: Any) -> None:
        if not isinstance(call, dict):
            raise ApiError("bad_request", f"The body must be an object, not {describe(call)}.")
        for name, (types, wanted) in _FIELDS.items():
            value = call.get(name)
            if isinstance(value, bool) or not isinstance(value, types):
                raise ApiError("bad_request", f"{name} must be {wanted}, not {describe(value)}.", param=name)
        number, data = call["fn_index"], call["data"]
        if number not in self.inputs:
            raise ApiError("bad_request", f"fn_index {describe(number)} is no event of the web UI.", param="fn_index")
        kinds = self.inputs[number]
        if len(data) != len(kinds):
            raise ApiError("bad_request", f"data has {len(data)} items; this event takes {len(kinds)}.", param="data")
        for index, (kind, value) in enumerate(zip(kinds, data, strict=True)):
            expected, fits = _VALUES.get(kind, _ANYTHING)
            if value is not None and not fits(value):
                name = f"data[{index}]"
                raise ApiError("bad_request", f"{name} must be {expected}, not {describe(value)}.", param=name)


def _again(body: bytes, receive: Receive) -> Receive:
    left = [body]

    async def receive_again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return receive_again
