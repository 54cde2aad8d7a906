"""The web UI as a client of the controller: list of models, a streamed answer, attention. No Gradio."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from babydoctor.conversation import Template, get_template, prompt_text, render_prompt
from babydoctor.schema import Turn, UserError
from babydoctor.serve.api.errors import ERROR_NO_WORKER, ERROR_NONE, ERROR_UNREACHABLE, OVERFLOW
from babydoctor.serve.api.protocol import Chunk, StreamDecoder
from babydoctor.serve.page.session import Exchange
from babydoctor.serve.page.texts import PageError

TIMEOUT = httpx.Timeout(60, connect=5)

POLL_S = 0.05
"""How often a running answer checks whether it should stop, and the shortest time between two updates."""

_CODES = {ERROR_NO_WORKER: "no_worker", ERROR_UNREACHABLE: "worker_lost"}


class ControllerClient:
    """One controller.

    Args:
        url: without a path.
        api_key: where it asks for one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Proxies from the environment are not used: images go to the controller and nowhere else.
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names of the models that can be asked now."""
        return list((await self._post("/list_models", {}))["models"])

    async def template(self, model: str) -> Template:
        """The conversation template of a model, which its run's manifest names."""
        name = (await self._post("/worker_get_conv_template", {"model": model}))["conv"]["name"]
        try:
            return get_template(str(name))
        except UserError:
            raise PageError("worker_failed") from None

    async def image_mode(self, model: str) -> str:
        """How the model makes a picture square: ``pad`` or ``square``."""
        return str((await self._post("/model_details", {"model": model})).get("image_mode", "pad"))

    async def shows_attention(self, model: str) -> bool:
        """True where the model's worker can tell where it looked. Workers for other servers cannot."""
        try:
            details = await self._post("/model_details", {"model": model})
        except PageError:
            return False
        return int(details.get("image_tokens") or 0) > 0

    async def attention(self, exchange: Exchange) -> dict[str, Any]:
        """Attention of each piece of an answer to the image patches, see ``protocol.AttentionReply``."""
        body = {
            "model": exchange.model,
            "prompt": exchange.prompt,
            "answer": exchange.answer,
            "images": [base64.b64encode(exchange.view.png).decode()],
        }
        return await self._post("/worker_attention", body)

    async def answer(self, exchange: Exchange, turns: Sequence[Turn]) -> AsyncIterator[None]:
        """Fill ``exchange`` with the model's answer; yields after each change.

        Leaving the iteration, or ``exchange.stop_requested``, closes the connection, and that stops the model.

        Raises:
            PageError: it was refused or broke off; ``exchange.answer`` keeps what had arrived.
        """
        template = await self.template(exchange.model)
        exchange.prompt = prompt_text(render_prompt(turns, template))
        sampling = exchange.sampling
        body = {
            "model": exchange.model,
            "prompt": exchange.prompt,
            "images": [base64.b64encode(exchange.view.png).decode()],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "stop": template.stop,
            "echo": False,
        }
        try:
            async with self._http.stream("POST", "/worker_generate_stream", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _error_of(response)
                async for _ in _read(response, exchange):
                    yield
        except httpx.HTTPError as error:
            raise _transport_error(error, has_begun=bool(exchange.answer)) from None

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = await self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise _transport_error(error, has_begun=False) from None
        if response.status_code != 200:
            raise _error_of(response)
        return dict(response.json())


async def _read(response: httpx.Response, exchange: Exchange) -> AsyncIterator[None]:
    """Read chunks until the end or until the user stops it; yields at most every ``POLL_S`` seconds."""
    decoder = StreamDecoder()
    stream = response.aiter_bytes()
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(_next(stream))
            done, _ = await asyncio.wait({coming}, timeout=POLL_S)
            if exchange.stop_requested:
                exchange.ended = "stopped"
                return
            if not done:
                continue
            data, coming = coming.result(), None
            if not data:
                # LLaVA's own workers send no finish reason; a stream that ends without an error is complete.
                exchange.ended = exchange.ended or "stop"
                return
            try:
                chunks = list(decoder.feed(data))
            except ValueError:
                raise PageError("worker_lost") from None
            before = exchange.answer
            for chunk in chunks:
                _take(chunk, exchange)
            if exchange.answer != before:
                yield
                await asyncio.sleep(POLL_S)
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _next(stream: AsyncIterator[bytes]) -> bytes:
    async for data in stream:
        if data:
            return data
    return b""


def _take(chunk: Chunk, exchange: Exchange) -> None:
    if chunk.code == OVERFLOW:
        raise PageError(OVERFLOW)
    if chunk.error_code != ERROR_NONE:
        raise PageError(chunk.code or _CODES.get(chunk.error_code, "worker_failed"))
    exchange.answer = chunk.text
    exchange.ended = chunk.finish_reason or exchange.ended


def _error_of(response: httpx.Response) -> PageError:
    try:
        code = str(response.json()["error"]["code"])
    except (json.JSONDecodeError, KeyError, TypeError):
        code = {413: "body_too_large", 429: "queue_full", 401: "bad_key"}.get(response.status_code, "internal")
    wait = response.headers.get("retry-after", "")
    return PageError(code, retry_after_s=float(wait) if wait.isdigit() else None)


def _transport_error(error: httpx.HTTPError, *, has_begun: bool) -> PageError:
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return PageError("no_controller")
    if isinstance(error, httpx.TimeoutException):
        return PageError("silent")
    return PageError("worker_lost" if has_begun else "silent")
