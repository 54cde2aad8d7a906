"""Clients of a controller or a worker; no torch.

``LlavaStream`` reads the LLaVA protocol's stream as deltas: for the web UI, the controller's relay, the benchmarks and
the soak test. ``Client`` asks single questions, synchronously, for ``demo --check`` and scripts.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from babydoctor.conversation import get_template, prompt_text, render_prompt
from babydoctor.schema import IMAGE_TOKEN, Turn, UserError
from babydoctor.serve.api.errors import ApiError, code_of_status, known_code, overflow_error
from babydoctor.serve.api.llava_stream import DELIMITER, ERROR_HEADER, MAX_MESSAGE_BYTES, LlavaReader
from babydoctor.serve.api.streaming import AnswerDelta, EndOfAnswer

TIMEOUT = httpx.Timeout(30, connect=5)

GENERATE_PATH = "/worker_generate_stream"
ATTENTION_PATH = "/worker_attention"


class AskError(UserError):
    """The server answered with an error; the message is the server's."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="server_refused")


def refusal_of(response: httpx.Response) -> ApiError:
    """The error of a response that was read: from its header, its JSON or, for other servers, its status."""
    try:
        data = json.loads(response.content.split(b"\0")[0])
    except ValueError:
        data = {}
    data = data if isinstance(data, dict) else {}
    error = data["error"] if isinstance(data.get("error"), dict) else {}
    code = known_code(response.headers.get(ERROR_HEADER) or error.get("code"), code_of_status(response.status_code))
    if code == "context_length_exceeded":
        return overflow_error()
    message = str(error.get("message") or data.get("text") or f"The server answered {response.status_code}.")
    retry_after = response.headers.get("retry-after", "")
    return ApiError(
        code, message, param=error.get("param"), retry_after_s=int(retry_after) if retry_after.isdecimal() else None
    )


def is_refusal(response: httpx.Response) -> bool:
    """True if a response holds an error instead of a stream."""
    return response.status_code != 200 or ERROR_HEADER in response.headers


class LlavaStream:
    """The deltas of one answer on the LLaVA protocol.

    Args:
        front: the beginning of the stream's texts: the prompt, or nothing with ``echo: false``.
        so_far: the part of this answer that another worker has already sent. It is not repeated.
    """

    def __init__(self, response: httpx.Response, *, front: str = "", so_far: str = "") -> None:
        self._reader = LlavaReader(front, so_far)
        self._bytes = response.aiter_raw()
        self._reading: asyncio.Future[bytes] | None = None
        self._ready: list[AnswerDelta] = []

    @property
    def so_far(self) -> str:
        """The text of the answer that has arrived so far."""
        return self._reader.so_far

    @property
    def is_cut(self) -> bool:
        """True if the stream ended inside a message."""
        return self._reader.pending > 0

    async def next(self, timeout_s: float) -> AnswerDelta | None:
        """The next delta; None if none arrives in time. A keep-alive is an empty delta.

        Raises:
            EndOfAnswer: the stream has ended.
            ValueError: the server does not follow this protocol.
            httpx.HTTPError: the connection broke.
        """
        while not self._ready:
            self._reading = self._reading or asyncio.ensure_future(anext(self._bytes, b""))
            await asyncio.wait({self._reading}, timeout=timeout_s)
            if not self._reading.done():
                return None
            reading, self._reading = self._reading, None
            if not (data := reading.result()):
                raise EndOfAnswer
            self._ready += self._reader.feed(data)
        return self._ready.pop(0)

    async def __aiter__(self) -> AsyncIterator[AnswerDelta]:
        try:
            while True:
                if (delta := await self.next(3600)) is not None:
                    yield delta
        except EndOfAnswer:
            return

    async def aclose(self) -> None:
        """Stop reading. The caller that opened the response closes it."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)


@asynccontextmanager
async def open_llava_stream(
    http: httpx.AsyncClient, body: dict[str, Any], *, url: str = ""
) -> AsyncIterator[LlavaStream]:
    """Send a request and read its answer as deltas. Leaving the context closes the connection, which stops the model.

    Raises:
        ApiError: the server refused.
        httpx.HTTPError: it cannot be reached.
    """
    async with http.stream("POST", f"{url}{GENERATE_PATH}", json=body) as response:
        if is_refusal(response):
            await response.aread()
            raise refusal_of(response)
        stream = LlavaStream(response, front=body["prompt"] if body.get("echo", True) else "")
        try:
            yield stream
        finally:
            await stream.aclose()


async def read_messages(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The messages of an open ``/worker_attention`` response with status 200: progress, then the reply.

    A server that knows no ``stream`` sends the reply alone, as JSON.

    Raises:
        ApiError: the work failed.
        ValueError: the server does not follow this protocol.
        httpx.HTTPError: the connection broke.
    """
    if response.headers.get("content-type", "").startswith("application/json"):
        yield _message(await response.aread())
        return
    buffer = bytearray()
    async for data in response.aiter_bytes():
        buffer += data
        *messages, rest = buffer.split(DELIMITER)
        buffer = bytearray(rest)
        if len(buffer) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message is longer than {MAX_MESSAGE_BYTES} bytes")
        for message in messages:
            yield _message(message)
    if buffer:
        raise ValueError("the stream ended inside a message")


def _message(data: bytes | bytearray) -> dict[str, Any]:
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    if isinstance(error := message.get("error"), dict):
        raise ApiError(known_code(error.get("code")), str(error.get("message")))
    return message


class Client:
    """One server.

    Args:
        url: URL of a controller or a worker, without ``/v1``.
        api_key: key, if the server requires one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models that can answer now."""
        return [card["id"] for card in _document(self._http.get("/v1/models"))["data"]]

    def template(self, model: str) -> str:
        """Name of the model's conversation template."""
        return str(_document(self._http.post("/worker_get_conv_template", json={"model": model}))["conv"]["name"])

    def stream_llava(
        self, model: str, prompt: str, images: list[bytes], *, max_new_tokens: int = 256, temperature: float = 0.0
    ) -> Iterator[AnswerDelta]:
        """Deltas of an answer on the LLaVA protocol.

        Raises:
            AskError: the server refuses, or the answer breaks off with an error.
        """
        body = {
            "model": model,
            "prompt": prompt,
            "images": [base64.b64encode(image).decode() for image in images],
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "stop": "</s>",
        }
        reader = LlavaReader(front=prompt)
        with self._http.stream("POST", GENERATE_PATH, json=body) as response:
            if is_refusal(response):
                response.read()
                raise AskError(refusal_of(response).message)
            for data in response.iter_bytes():
                for delta in reader.feed(data):
                    if delta.error is not None:
                        raise AskError(delta.error.message)
                    yield delta

    def ask_llava(self, model: str, question: str, image: bytes | None = None, **sampling: float) -> str:
        """Ask one question over the LLaVA API. The client builds the prompt, as the protocol requires."""
        text = question if image is None else f"{IMAGE_TOKEN}\n{question}"
        prompt = prompt_text(render_prompt([Turn("user", text)], get_template(self.template(model))))
        images = [] if image is None else [image]
        return "".join(delta.text for delta in self.stream_llava(model, prompt, images, **sampling))  # type: ignore[arg-type]

    def stream_openai(
        self, model: str, question: str, image: bytes | None = None, *, max_tokens: int = 256, temperature: float = 0.0
    ) -> Iterator[str]:
        """Pieces of an answer on OpenAI's API.

        Raises:
            AskError: the server refuses, or the answer breaks off with an error.
        """
        content: list[dict[str, object]] = [{"type": "text", "text": question}]
        if image is not None:
            url = f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                _document(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise AskError(event["error"]["message"])
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece

    def ask_openai(self, model: str, question: str, image: bytes | None = None) -> str:
        """Ask one question over OpenAI's API."""
        return "".join(self.stream_openai(model, question, image))


def _document(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise AskError(refusal_of(response).message)
    return dict(response.json())
