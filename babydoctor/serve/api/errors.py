"""Errors of the HTTP APIs. A table maps each code to its HTTP status, LLaVA's ``error_code`` and ``Retry-After``.

Programs read ``code``. The message is for people and may change at any time. The serving guide (``serve/README.md``)
documents the table, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from babydoctor.errors import UserError, UserErrorCode

ERROR_NONE = 0
ERROR_WORKER = 1
"""The request was bad, or the worker failed."""
ERROR_NO_WORKER = 2
"""No worker serves that model."""
ERROR_UNREACHABLE = 3
"""The worker was lost and no other worker could continue."""

ApiCode = Literal[
    "bad_request",
    "bad_json",
    "json_too_deep",
    "json_too_large",
    "body_too_large",
    "body_timeout",
    "client_left",
    "bad_key",
    "bad_secret",
    "bad_origin",
    "not_found",
    "method_not_allowed",
    "http_error",
    "bad_messages",
    "bad_prompt",
    "prompt_too_long",
    "context_length_exceeded",
    "bad_resume_ids",
    "bad_schema",
    "unsupported",
    "bad_base64",
    "bad_data_url",
    "bad_image",
    "image_too_large",
    "image_decode_failed",
    "image_decode_timeout",
    "image_url_refused",
    "too_many_images",
    "wrong_image_count",
    "model_not_found",
    "no_worker",
    "not_ready",
    "queue_full",
    "draining",
    "deadline",
    "worker_lost",
    "worker_failed",
    "worker_refused",
    "bad_worker_name",
    "worker_unreachable",
    "upstream_lost",
    "upstream_refused",
    "upstream_key",
    "internal",
]
"""The closed set of codes of ``ApiError``."""

OVERFLOW: ApiCode = "context_length_exceeded"

API_CODES: tuple[ApiCode, ...] = get_args(ApiCode)


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """Status and meaning of a code."""

    status: int
    meaning: str
    error_code: int = ERROR_WORKER
    retry_after_s: int | None = None


ERROR_KINDS: Mapping[ApiCode, ErrorKind] = {
    "bad_request": ErrorKind(422, "A field is missing or has a wrong type or value"),
    "bad_json": ErrorKind(422, "The body is not valid JSON; the message says at which line and column"),
    "json_too_deep": ErrorKind(422, "The body nests too deeply"),
    "json_too_large": ErrorKind(422, "The body contains too many values"),
    "body_too_large": ErrorKind(413, "The body exceeds `limits.max_body_bytes`"),
    "body_timeout": ErrorKind(408, "The body did not arrive within `limits.body_timeout_s`"),
    "client_left": ErrorKind(400, "The connection ended before the body did"),
    "bad_key": ErrorKind(401, "No valid API key"),
    "bad_secret": ErrorKind(403, "No valid registration secret"),
    "bad_origin": ErrorKind(403, "The request comes from another site: see `allowed_hosts` and `cors_origins`"),
    "not_found": ErrorKind(404, "No such path"),
    "method_not_allowed": ErrorKind(405, "The path does not take this method"),
    "http_error": ErrorKind(400, "The request is not valid HTTP"),
    "bad_messages": ErrorKind(422, "The messages are not a conversation"),
    "bad_prompt": ErrorKind(422, "The prompt is not a conversation in the model's template"),
    "prompt_too_long": ErrorKind(422, "The prompt exceeds `limits.max_prompt_chars`"),
    "context_length_exceeded": ErrorKind(
        422, "The conversation leaves no room for an answer; LLaVA's stream carries it as a notice", ERROR_NONE
    ),
    "bad_resume_ids": ErrorKind(422, "`resume_ids` cannot be continued here"),
    "bad_schema": ErrorKind(422, "The JSON schema of `response_format` cannot be enforced"),
    "unsupported": ErrorKind(422, "The server does not support this field, or this model cannot do it"),
    "bad_base64": ErrorKind(422, "An image is not base64"),
    "bad_data_url": ErrorKind(422, "An image's data URL is malformed"),
    "bad_image": ErrorKind(422, "An image cannot be decoded"),
    "image_too_large": ErrorKind(413, "An image exceeds `limits.max_pixels` or `remote_images.max_bytes`"),
    "image_decode_failed": ErrorKind(422, "The decoder of an image failed or needed too much memory"),
    "image_decode_timeout": ErrorKind(422, "An image takes longer to decode than `limits.decode_seconds`"),
    "image_url_refused": ErrorKind(422, "An image by URL is not allowed, or could not be downloaded"),
    "too_many_images": ErrorKind(422, "More images than `limits.max_images`"),
    "wrong_image_count": ErrorKind(422, "The number of `<image>` markers differs from the number of images"),
    "model_not_found": ErrorKind(
        404, "No worker serves that model; the message lists those that exist", ERROR_NO_WORKER
    ),
    "no_worker": ErrorKind(503, "No worker for this model is up at the moment", ERROR_NO_WORKER, 5),
    "not_ready": ErrorKind(
        503, "No request can be answered now: the engine or image decoding is stuck or dead", retry_after_s=5
    ),
    "queue_full": ErrorKind(429, "All request slots are taken; `Retry-After` says when to retry", retry_after_s=5),
    "draining": ErrorKind(503, "The server is shutting down", retry_after_s=5),
    "deadline": ErrorKind(504, "The answer took longer than `limits.request_timeout_s`"),
    "worker_lost": ErrorKind(503, "The worker was lost and no other could continue", ERROR_UNREACHABLE, 5),
    "worker_failed": ErrorKind(500, "The model failed at this request"),
    "worker_refused": ErrorKind(500, "The worker does not accept the controller's registration secret"),
    "bad_worker_name": ErrorKind(422, "`worker_name` is not a valid URL"),
    "worker_unreachable": ErrorKind(422, "The worker does not answer at its `worker_name`"),
    "upstream_lost": ErrorKind(503, "The upstream server broke off or cannot be reached", retry_after_s=5),
    "upstream_refused": ErrorKind(422, "The upstream server refused the request"),
    "upstream_key": ErrorKind(500, "The upstream server does not accept the worker's key"),
    "internal": ErrorKind(500, "The server failed; its log says where"),
}

CODE_OF_USER_ERROR: Mapping[UserErrorCode, ApiCode] = {
    "image_missing": "bad_image",
    "image_empty": "bad_image",
    "image_unreadable": "bad_image",
    "image_too_large": "image_too_large",
    "image_bad_shape": "bad_image",
    "dicom_unreadable": "bad_image",
    "dicom_without_image": "bad_image",
    "dicom_without_decoder": "bad_image",
    "dicom_unsupported": "bad_image",
    "image_decode_failed": "image_decode_failed",
    "image_decode_timeout": "image_decode_timeout",
    "image_decoder_down": "not_ready",
    "conversation_order": "bad_messages",
    "prompt_format": "bad_prompt",
    "address_invalid": "bad_worker_name",
}
"""The API code for each ``UserError`` code that a request can cause; see ``code_of_user_error``."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that is sent to a client.

    Args:
        code: see ``ERROR_KINDS``.
        message: one or two sentences for people. Contains nothing of other requests and no address.
        param: the field that is wrong.
        retry_after_s: seconds after which to retry, sent as ``Retry-After``; None: the code's default.
    """

    def __init__(
        self, code: ApiCode, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        kind = ERROR_KINDS[code]
        self.code: ApiCode = code
        self.message = message
        self.param = param
        self.status = kind.status
        self.error_code = kind.error_code
        self.retry_after_s = kind.retry_after_s if retry_after_s is None else retry_after_s

    @property
    def type(self) -> str:
        """The kind of error as OpenAI names it."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """JSON for every kind of client: OpenAI's ``error`` object, and LLaVA's ``text`` and ``error_code``."""
        error = {"message": self.message, "type": self.type, "code": self.code, "param": self.param}
        return {"error": error, "text": self.message, "error_code": self.error_code}


def known_code(code: object, default: ApiCode = "worker_failed") -> ApiCode:
    """``code`` if it is one of ours, else ``default``, because another server may send any text."""
    return cast(ApiCode, code) if code in API_CODES else default


def code_of_status(status: int) -> ApiCode:
    """The code for another server's refusal that carries none of our codes."""
    if status == 429:
        return "queue_full"
    if status in (401, 403):
        return "worker_refused"
    return "worker_lost" if status in (502, 503, 504) else "worker_failed"


def code_of_user_error(error: UserError) -> ApiCode:
    """The API code of a ``UserError`` that a request caused."""
    return CODE_OF_USER_ERROR.get(error.code, "bad_request")


def overflow_error() -> ApiError:
    """The error for a prompt that leaves no room for an answer. LLaVA's stream sends it as a notice."""
    message = "The conversation is too long for the model. Start a new one."
    return ApiError("context_length_exceeded", message, param="prompt")


def model_failed_error() -> ApiError:
    """The error for one request of a batch at which the model failed."""
    return ApiError("worker_failed", "The model failed at this request. Other requests are not affected.")


def model_not_found(model: str, known: list[str]) -> ApiError:
    """The error for a model that no worker serves. The message names the models that exist."""
    exist = f"It serves {', '.join(known)}." if known else "It serves no model at the moment."
    return ApiError("model_not_found", f"This server does not serve the model {model!r}. {exist}", param="model")
