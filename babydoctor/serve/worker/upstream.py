"""A worker without a model that forwards requests to an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...).

Controller and clients see a normal worker, with its own admission, deadlines, errors and metrics. When a client
disconnects, the worker closes its connection to the server, which stops the answer there.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx

from babydoctor.engine.request import Usage
from babydoctor.schema import UserError
from babydoctor.serve.api.admission import check_request
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import AttentionRequest, CountTokenRequest, GenerateRequest
from babydoctor.serve.api.responses import late_error
from babydoctor.serve.api.streaming import AnswerDelta, AnswerStream
from babydoctor.serve.settings import ServeSettings
from babydoctor.serve.worker.backend import SingleModelBackend, draining_error
from babydoctor.serve.worker.preprocess import decode_limits
from babydoctor.serve.worker.upstream_api import chat_body, lost, read_events, read_logprob, refusal

CONNECT_TIMEOUT_S = 5.0
PROBE_EVERY_S = 5.0

_BROKE_OFF = "The server behind this worker broke off."

NUM_RUNNING = 16
"""Most requests forwarded at the same time. The server has its own queue."""


@dataclass(eq=False)
class _PassedRequest:
    """One forwarded request."""

    answer: AnswerStream
    received_s: float
    has_text: bool = False
    usage: Usage | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None
    expired: bool = False
    error: ApiError | None = None
    accepted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: asyncio.Task[None] | None = None


class UpstreamWorker(SingleModelBackend):
    """The backend behind the routes of an upstream worker; see ``worker.Worker`` for the other kind.

    Args:
        url: URL of the server, with or without ``/v1``.
        model: name of the model on the server.
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
        self._open: set[_PassedRequest] = set()

    def unready(self) -> str | None:
        return "The worker is shutting down." if self.draining else self._unreachable

    async def open(self, request: GenerateRequest) -> AnswerStream:
        self._check_model(request.model)
        self._check_not_draining()
        check_request(request, self.settings.limits)
        self.slots.take()
        received_s = time.monotonic()
        try:
            body = await asyncio.to_thread(
                chat_body, request, self.model, self._template, decode_limits(self.settings.limits)
            )
        except BaseException:
            self.slots.free(time.monotonic() - received_s)
            raise
        passed = _PassedRequest(AnswerStream(self._nothing), received_s)
        passed.answer = AnswerStream(lambda: self._stop(passed))
        self._open.add(passed)
        passed.task = asyncio.ensure_future(self._run(passed, body))
        # Wait until the server accepts the request, so that a refusal becomes an HTTP status, not a broken stream.
        try:
            await asyncio.wait([passed.task, passed.accepted], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._stop(passed)
            raise
        if passed.error is not None and not passed.accepted.done():
            raise passed.error
        return passed.answer

    def attention(self, request: AttentionRequest) -> AsyncGenerator[dict[str, Any], None]:
        raise ApiError("unsupported", "This worker's model runs on a server that cannot compute attention maps.")

    async def count_tokens(self, request: CountTokenRequest) -> int:
        raise ApiError("unsupported", "This worker's model runs on a server that cannot count tokens.")

    async def model_details(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return {"model": self.name, "template": self._template.name, "engine": "openai"}

    def start(self) -> None:
        """Open the connections. Called in the event loop before the first request."""
        timeout = httpx.Timeout(self.settings.limits.request_timeout_s, connect=CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=self.slots.capacity + 1)
        self._client = httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits, trust_env=False)
        self._probing = asyncio.ensure_future(self._probe())

    async def drain(self) -> None:
        """Accept no new requests, let running answers finish within ``drain_s``, then stop them."""
        self.draining = True
        deadline = time.monotonic() + self.settings.worker.drain_s
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for passed in list(self._open):
            passed.answer.fail(draining_error())
            await self._stop(passed)

    def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        for passed in list(self._open):
            if passed.task is not None:
                passed.task.cancel()

    # One request.

    async def _run(self, passed: _PassedRequest, body: dict[str, Any]) -> None:
        reason = "cancelled"
        limit_s = self.settings.limits.request_timeout_s
        timer = asyncio.get_running_loop().call_later(limit_s, self._expire, passed)
        try:
            await self._stream(passed, body)
            reason = passed.finish_reason or "stop"
            passed.answer.put(AnswerDelta(finish_reason=reason, usage=passed.usage))
        except asyncio.CancelledError:
            if not passed.expired:
                raise
            reason = "deadline"
            self._fail(passed, late_error())
        except ApiError as error:
            reason = "error"
            self._fail(passed, error)
        except httpx.HTTPError:
            reason = "error"
            self._fail(passed, lost(_BROKE_OFF) if passed.has_text else lost())
        finally:
            timer.cancel()
            now_s = time.monotonic()
            passed.answer.finish()
            self._open.discard(passed)
            self.slots.free(now_s - passed.received_s)
            self.metrics.finished.labels(reason).inc()
            if passed.usage is not None:
                self.metrics.prompt_tokens.inc(passed.usage.prompt_tokens)
                self.metrics.generated_tokens.inc(passed.usage.completion_tokens)

    async def _stream(self, passed: _PassedRequest, body: dict[str, Any]) -> None:
        assert self._client is not None, "start() comes before the first request"
        async with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise refusal(response.status_code, await response.aread(), response.headers)
            passed.accepted.set_result(None)
            ended = False
            async for event in read_events(response):
                if event is None:
                    ended = True
                    break
                self._on_event(passed, event)
        if not ended and passed.finish_reason is None:
            raise lost(_BROKE_OFF)

    def _on_event(self, passed: _PassedRequest, event: dict[str, Any]) -> None:
        if "error" in event:
            raise refusal(500, json.dumps(event).encode(), httpx.Headers())
        if isinstance(usage := event.get("usage"), dict):
            passed.usage = Usage(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
        for choice in event.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") or ""
            logprobs = tuple(read_logprob(item) for item in (choice.get("logprobs") or {}).get("content") or ())
            if text or logprobs:
                if passed.first_token_s is None:
                    passed.first_token_s = time.monotonic()
                    self.metrics.first_token.observe(passed.first_token_s - passed.received_s)
                passed.has_text = True
                passed.answer.put(AnswerDelta(text, logprobs=logprobs))
            if choice.get("finish_reason"):
                passed.finish_reason = "length" if choice["finish_reason"] == "length" else "stop"

    @staticmethod
    def _fail(passed: _PassedRequest, error: ApiError) -> None:
        passed.error = error
        passed.answer.fail(error)

    @staticmethod
    def _expire(passed: _PassedRequest) -> None:
        passed.expired = True
        if passed.task is not None:
            passed.task.cancel()

    async def _stop(self, passed: _PassedRequest) -> None:
        """Close the connection when the reader is done or has disconnected, so that the server stops too."""
        if passed.task is not None and not passed.task.done():
            passed.task.cancel()
            await asyncio.wait([passed.task])

    async def _probe(self) -> None:
        """Check the server regularly, so that ``/readyz`` reports if it is down."""
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
    """Build a worker for the server at ``url`` and its ``model``, by default the first that it lists.

    Raises:
        UserError: the server cannot be reached, or no model is named and it lists none.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{api_root(url)}/models", headers=headers, timeout=CONNECT_TIMEOUT_S, trust_env=False)
        # `transformers serve` lists the models in the hub's cache, not those it serves, so a given name is not checked.
        if model is None:
            answer.raise_for_status()
            model = answer.json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--url {url!r}: no OpenAI-compatible server lists a model there ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Start it first, or name the model with --model if it lists none. If it "
            "needs a key, set BABYDOCTOR_UPSTREAM_KEY"
        ) from None
    chosen = str(model)
    name = settings.worker.model_name or chosen.rstrip("/").rpartition("/")[2]
    return UpstreamWorker(url, chosen, template, settings, name, api_key=api_key)


def api_root(url: str) -> str:
    """``http://host:8000`` and ``http://host:8000/v1/`` -> ``http://host:8000/v1``."""
    return url.rstrip("/").removesuffix("/v1") + "/v1"
