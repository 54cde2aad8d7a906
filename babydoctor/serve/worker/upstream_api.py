"""Build requests for an OpenAI-compatible server, and read its events."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from babydoctor.conversation import Template, parse_prompt
from babydoctor.engine.request import TokenLogprob
from babydoctor.imaging.isolation import load_image
from babydoctor.imaging.jpeg import without_metadata
from babydoctor.imaging.limits import DecodeLimits
from babydoctor.schema import IMAGE_TOKEN, Turn, UserError
from babydoctor.serve.api.admission import decode_image
from babydoctor.serve.api.errors import ApiError, code_of_user_error
from babydoctor.serve.api.llava_stream import NO_TOKEN_ID
from babydoctor.serve.api.protocol import MAX_NEW_TOKENS, GenerateRequest


def chat_body(request: GenerateRequest, model: str, template: Template, limits: DecodeLimits) -> dict[str, Any]:
    """Build the body of a request for the server's chat completions.

    Messages from OpenAI's API are forwarded unchanged (``turns``). A prompt of the LLaVA API is parsed.

    Raises:
        ApiError: an image cannot be decoded, the prompt is not in the template, or a field is not supported.
    """
    _refuse_unsupported(request)
    images = iter([_image_url(text, index, limits) for index, text in enumerate(request.images or ())])
    system, turns = _conversation(request, template)
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages += [_message(turn, images) for turn in turns]
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": min(request.max_new_tokens, MAX_NEW_TOKENS),
        "temperature": 0.0 if request.greedy else request.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.top_p < 1:
        body["top_p"] = max(request.top_p, 1e-6)
    # The end-of-text token ends the answer anyway, and not every server accepts special tokens as stop strings.
    if stops := [text for text in request.stops if text != template.stop]:
        body["stop"] = stops
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": max(0, int(request.logprobs) - 1)}
    if request.json_schema is not None:
        schema = {"name": "answer", "schema": request.json_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if turns[-1].role == "assistant":
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    # Send only values that differ from the defaults, because not every server knows vLLM's fields.
    defaults = GenerateRequest(prompt="")
    for name in ("seed", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"):
        if (value := getattr(request, name)) != getattr(defaults, name):
            body[name] = value
    if request.ignore_eos:
        body["ignore_eos"] = True
    return body


def _refuse_unsupported(request: GenerateRequest) -> None:
    if request.resume_ids:
        raise ApiError("bad_resume_ids", "This worker cannot continue another worker's answer.", param="resume_ids")
    if request.continues and request.turns is None:
        message = "This model's worker forwards messages, so it cannot complete a bare prompt; use chat completions."
        raise ApiError("unsupported", message, param="prompt")


def _conversation(request: GenerateRequest, template: Template) -> tuple[str | None, list[Turn]]:
    if request.turns:
        return request.system, [Turn(turn.role, turn.text) for turn in request.turns]
    try:
        return parse_prompt(request.prompt, template)
    except UserError as error:
        raise ApiError(code_of_user_error(error), f"{error}.", param="prompt") from None


def _message(turn: Turn, images: Iterator[str]) -> dict[str, Any]:
    if turn.role == "assistant":  # in an answer, the marker is plain text
        return {"role": turn.role, "content": turn.text}
    # In our prompts an image is on a line before the text. The server's chat template puts it there again.
    text = turn.text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")
    parts = [{"type": "image_url", "image_url": {"url": next(images)}} for _ in range(turn.text.count(IMAGE_TOKEN))]
    return {"role": turn.role, "content": [*parts, {"type": "text", "text": text}] if parts else text}


def _image_url(text: str, index: int, limits: DecodeLimits) -> str:
    """A data URL of the upright image without metadata. All but plain upright JPEG files are converted to PNG."""
    data = decode_image(text, index)
    try:
        image = load_image(data, limits=limits)
    except UserError as error:
        raise ApiError(code_of_user_error(error), str(error), param=f"images[{index}]") from None
    if data[:2] == b"\xff\xd8" and (jpeg := without_metadata(data)) is not None:
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


async def read_events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """Yield server-sent events as JSON, and None for the end marker.

    Raises:
        ApiError: an event is not JSON.
    """
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            yield None
        elif data:
            try:
                event = json.loads(data)
            except json.JSONDecodeError:
                raise lost("The server behind this worker sent an event that is not JSON.") from None
            if isinstance(event, dict):
                yield event


def read_logprob(item: dict[str, Any]) -> TokenLogprob:
    """One token's entry of chat completions' ``logprobs.content``."""
    top = tuple(
        (NO_TOKEN_ID, other.get("token", ""), float(other["logprob"])) for other in item.get("top_logprobs") or ()
    )
    return TokenLogprob(NO_TOKEN_ID, item.get("token", ""), float(item["logprob"]), top)


def lost(message: str = "The server behind this worker cannot be reached.") -> ApiError:
    return ApiError("upstream_lost", message)


def refusal(status: int, body: bytes, headers: httpx.Headers) -> ApiError:
    """The error for the server's refusal. Its message is forwarded if the client can fix the problem."""
    if status == 429:
        wait = headers.get("retry-after", "")
        message = "The model is busy. Please try again soon."
        return ApiError("queue_full", message, retry_after_s=int(wait) if wait.isdigit() else None)
    if status in (400, 404, 413, 422):
        try:
            parsed = json.loads(body)
            message = str((parsed.get("error") or parsed).get("message") or parsed.get("detail") or "")
        except (ValueError, AttributeError):
            message = ""
        return ApiError("upstream_refused", f"The server behind this worker refused: {message[:500] or status}")
    if status in (401, 403):
        return ApiError("upstream_key", "The server behind this worker does not accept its key.")
    return ApiError("worker_failed", "The server behind this worker failed at this request.")
