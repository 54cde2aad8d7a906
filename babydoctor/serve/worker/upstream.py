"""A worker without a model: it passes requests on to an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...).

To controller and clients it is a worker like any other: admission, deadlines, errors and metrics are its own. A client
that leaves closes the connection to the server behind, which is how such servers learn that nobody listens.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from babydoctor.imaging.load import load_image
from babydoctor.schema import IMAGE_TOKEN, UserError
from babydoctor.serve.api.admission import check_request, decode_image
from babydoctor.serve.api.errors import ApiError, code_of_user_error
from babydoctor.serve.api.protocol import (
    MAX_NEW_TOKENS,
    AttentionRequest,
    Chunk,
    CountTokenRequest,
    GenerateRequest,
    TokenLogprob,
    Usage,
)
from babydoctor.serve.api.streaming import Answer
from babydoctor.serve.prompt_turns import prompt_to_turns
from babydoctor.serve.settings import ServeSettings
from babydoctor.serve.worker.backend import SingleModelBackend

CONNECT_TIMEOUT_S = 5.0
PROBE_EVERY_S = 5.0

NUM_RUNNING = 16
"""Requests that are passed on at the same time; the server behind has a queue of its own."""


@dataclass(eq=False)
class _Job:
    """One request on its way."""

    answer: Answer
    received_s: float
    text: str = ""
    num_chunks: int = 0
    usage: Usage | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None
    expired: bool = False
    error: ApiError | None = None
    accepted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: asyncio.Task[None] | None = None


class UpstreamWorker(SingleModelBackend):
    """The backend behind a worker's routes, as ``worker.Worker`` is.

    Args:
        url: of the server, with or without ``/v1``.
        model: its name there.
        template: the template in which clients send prompts.
        api_key: sent to the server.
    """

    def __init__(
        self, url: str, model: str, template: str, settings: ServeSettings, name: str, *, api_key: str | None = None
    ) -> None:
        super().__init__(settings, name, template, NUM_RUNNING)
        self.url = api_root(url)
        self.model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client: httpx.AsyncClient | None = None
        self._probing: asyncio.Task[None] | None = None
        self._unreachable: str | None = None
        self._jobs: set[_Job] = set()

    def unready(self) -> str | None:
        return "The worker is shutting down." if self.draining else self._unreachable

    async def open(self, request: GenerateRequest) -> Answer:
        self._check_model(request.model)
        self._check_not_draining()
        if request.resume_ids:
            raise ApiError("bad_resume_ids", "This worker cannot continue another's answer.", param="resume_ids")
        check_request(request, self.settings.limits)
        self.places.take()
        received_s = time.monotonic()
        try:
            body = await asyncio.to_thread(self._to_chat, request)
        except BaseException:
            self.places.give_back(time.monotonic() - received_s)
            raise
        job = _Job(Answer(self._nothing), received_s)
        job.answer = Answer(lambda: self._stop(job))
        self._jobs.add(job)
        job.task = asyncio.ensure_future(self._run(job, body))
        # Until the server has taken the request, a refusal is an HTTP status and not a broken stream.
        try:
            await asyncio.wait([job.task, job.accepted], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._stop(job)
            raise
        if job.error is not None and not job.accepted.done():
            raise job.error
        return job.answer

    async def attention(self, request: AttentionRequest) -> dict[str, Any]:
        raise ApiError("unsupported", "This worker's model is on a server that does not show its attention.")

    async def count_tokens(self, request: CountTokenRequest) -> int:
        raise ApiError("unsupported", "This worker's model is on a server that does not count tokens.")

    async def model_details(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return {"model": self.name, "template": self._template.name, "engine": "openai"}

    def start(self) -> None:
        """Called in the event loop before the first request."""
        timeout = httpx.Timeout(self.settings.limits.request_timeout_s, connect=CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=self.places.capacity + 1)
        self._client = httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits)
        self._probing = asyncio.ensure_future(self._probe())

    async def drain(self) -> None:
        """Take nothing new; let running answers finish within ``drain_s``, then break them off."""
        self.draining = True
        deadline = time.monotonic() + self.settings.worker.drain_s
        while self._jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for job in list(self._jobs):
            job.answer.fail(ApiError("draining", "The worker is shutting down."))
            await self._stop(job)

    def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        for job in list(self._jobs):
            if job.task is not None:
                job.task.cancel()

    # One request.

    def _to_chat(self, request: GenerateRequest) -> dict[str, Any]:
        """LLaVA's prompt and images as OpenAI's messages."""
        images = [decode_image(text, index) for index, text in enumerate(request.images or ())]
        urls = [self._image_url(data, index) for index, data in enumerate(images)]
        system, turns = prompt_to_turns(request.prompt, self._template)
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            num_images = turn.text.count(IMAGE_TOKEN)
            # An image stands on a line of its own, before the text; the server's chat template puts it there again.
            text = turn.text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": urls.pop(0)}} for _ in range(num_images)
            ]
            content = [*parts, {"type": "text", "text": text}] if parts else text
            messages.append({"role": turn.role, "content": content})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": min(request.max_new_tokens, MAX_NEW_TOKENS),
            "temperature": 0.0 if request.temperature <= 1e-3 else request.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.top_p < 1:
            body["top_p"] = max(request.top_p, 1e-6)
        # The end-of-sequence token ends the answer there anyway, and not every server takes special tokens as stops.
        if stops := [text for text in request.stops if text != self._template.stop]:
            body["stop"] = stops
        if request.seed is not None:
            body["seed"] = request.seed
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": max(0, int(request.logprobs) - 1)}
        return body

    def _image_url(self, data: bytes, index: int) -> str:
        """A data URL; what only we can read (DICOM, TIFF, 16 bits) becomes a PNG."""
        try:
            image = load_image(data, max_pixels=self.settings.limits.max_pixels)
        except UserError as error:
            raise ApiError(code_of_user_error(error), str(error), param=f"images[{index}]") from None
        if data[:2] == b"\xff\xd8":
            return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    async def _run(self, job: _Job, body: dict[str, Any]) -> None:
        reason = "cancelled"
        limit_s = self.settings.limits.request_timeout_s
        timer = asyncio.get_running_loop().call_later(limit_s, self._expire, job)
        try:
            await self._stream(job, body)
            reason = job.finish_reason or "stop"
            job.answer.put(Chunk(job.text, finish_reason=reason, usage=job.usage))
        except asyncio.CancelledError:
            if not job.expired:
                raise
            reason = "deadline"
            self._fail(job, ApiError("deadline", "The answer took longer than this server allows."))
        except ApiError as error:
            reason = "error"
            self._fail(job, error)
        except httpx.HTTPError:
            reason = "error"
            self._fail(job, _lost("The server behind this worker broke off." if job.num_chunks else None))
        finally:
            timer.cancel()
            now_s = time.monotonic()
            job.answer.finish()
            self._jobs.discard(job)
            self.places.give_back(now_s - job.received_s)
            self.metrics.finished.labels(reason).inc()
            if job.usage is not None:
                self.metrics.prompt_tokens.inc(job.usage.prompt_tokens)
                self.metrics.generated_tokens.inc(job.usage.completion_tokens)

    async def _stream(self, job: _Job, body: dict[str, Any]) -> None:
        assert self._client is not None, "start() comes before the first request"
        async with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise _api_error(response.status_code, await response.aread(), response.headers)
            job.accepted.set_result(None)
            ended = False
            async for event in _events(response):
                if event is None:
                    ended = True
                    break
                self._on_event(job, event)
        if not ended and job.finish_reason is None:
            raise _lost("The server behind this worker broke off.")

    def _on_event(self, job: _Job, event: dict[str, Any]) -> None:
        if "error" in event:
            raise _api_error(500, json.dumps(event).encode(), httpx.Headers())
        if (usage := event.get("usage")) is not None:
            job.usage = Usage(**{key: usage.get(key) or 0 for key in Usage.model_fields})
        for choice in event.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") or ""
            logprobs = tuple(_logprob(item) for item in (choice.get("logprobs") or {}).get("content") or ())
            if text or logprobs:
                if job.first_token_s is None:
                    job.first_token_s = time.monotonic()
                    self.metrics.first_token.observe(job.first_token_s - job.received_s)
                job.text += text
                job.num_chunks += 1
                job.answer.put(Chunk(job.text, logprobs=logprobs))
            if choice.get("finish_reason"):
                job.finish_reason = "length" if choice["finish_reason"] == "length" else "stop"

    @staticmethod
    def _fail(job: _Job, error: ApiError) -> None:
        job.error = error
        job.answer.fail(error)

    @staticmethod
    def _expire(job: _Job) -> None:
        job.expired = True
        if job.task is not None:
            job.task.cancel()

    async def _stop(self, job: _Job) -> None:
        """The reader is done or has left: close the connection, so that the server behind stops too."""
        if job.task is not None and not job.task.done():
            job.task.cancel()
            await asyncio.wait([job.task])

    async def _probe(self) -> None:
        """Keep an eye on the server, so that a controller is told when it has gone."""
        assert self._client is not None
        while True:
            try:
                answer = await self._client.get(f"{self.url}/models", timeout=CONNECT_TIMEOUT_S)
                gone = answer.status_code in (502, 503, 504)
                self._unreachable = "The server behind this worker is not ready." if gone else None
            except httpx.HTTPError:
                self._unreachable = "The server behind this worker cannot be reached."
            await asyncio.sleep(PROBE_EVERY_S)


def load_upstream(
    url: str, model: str | None, template: str, settings: ServeSettings, api_key: str | None
) -> UpstreamWorker:
    """A worker before the server at ``url``; without ``model``, before the first model that it lists.

    Raises:
        UserError: the server cannot be reached, or no model is named and it lists none.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{api_root(url)}/models", headers=headers, timeout=CONNECT_TIMEOUT_S)
        # transformers serve lists what lies in the hub's cache, not what it serves: a name that is given counts.
        if model is None:
            answer.raise_for_status()
            model = answer.json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--url {url!r}: no OpenAI-compatible server lists a model there ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Start it first, or name the model with --model where it lists none; if it "
            "wants a key, put it into BABYDOCTOR_UPSTREAM_KEY"
        ) from None
    chosen = str(model)
    name = settings.worker.model_name or chosen.rstrip("/").rpartition("/")[2]
    return UpstreamWorker(url, chosen, template, settings, name, api_key=api_key)


def api_root(url: str) -> str:
    """``http://host:8000`` and ``http://host:8000/v1/`` -> ``http://host:8000/v1``."""
    return url.rstrip("/").removesuffix("/v1") + "/v1"


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """Server-sent events as JSON; None for the end mark."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            yield None
        elif data:
            try:
                event = json.loads(data)
            except json.JSONDecodeError:
                raise _lost("The server behind this worker sent what is not JSON.") from None
            if isinstance(event, dict):
                yield event


def _logprob(item: dict[str, Any]) -> TokenLogprob:
    top = tuple((other.get("token", ""), float(other["logprob"])) for other in item.get("top_logprobs") or ())
    return TokenLogprob(item.get("token", ""), float(item["logprob"]), top)


def _lost(message: str | None) -> ApiError:
    return ApiError("upstream_lost", message or "The server behind this worker cannot be reached.", retry_after_s=5)


def _api_error(status: int, body: bytes, headers: httpx.Headers) -> ApiError:
    """The server's refusal; its words are passed on where the client can do something about it."""
    if status == 429:
        wait = headers.get("retry-after", "")
        return ApiError(
            "queue_full",
            "The model is busy. Please try again soon.",
            retry_after_s=int(wait) if wait.isdigit() else 5,
        )
    if status in (400, 404, 413, 422):
        try:
            parsed = json.loads(body)
            message = str((parsed.get("error") or parsed).get("message") or parsed.get("detail") or "")
        except (ValueError, AttributeError):
            message = ""
        return ApiError("upstream_refused", f"The server behind this worker refused: {message[:500] or status}")
    if status in (401, 403):
        return ApiError("upstream_key", "The server behind this worker does not take its key.")
    return ApiError("worker_failed", "The server behind this worker failed at this request.")
