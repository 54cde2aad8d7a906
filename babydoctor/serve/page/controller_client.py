"""The web UI's client of the controller: the list of models, streamed answers, occlusion maps. No Gradio."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from babydoctor.conversation import Template, get_template, prompt_text, render_prompt
from babydoctor.schema import Turn, UserError
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.streaming import EndOfAnswer
from babydoctor.serve.client import ATTENTION_PATH, LlavaStream, open_llava_stream, read_messages, refusal_of
from babydoctor.serve.page.session import Exchange
from babydoctor.serve.page.texts import PageError

TIMEOUT = httpx.Timeout(60, connect=5)

POLL_S = 0.05
"""Interval at which a running answer checks for a stop request, and shortest time between two updates."""


class ControllerClient:
    """One controller.

    Args:
        url: URL without a path.
        api_key: key, if the controller requires one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Ignore proxies from the environment: images must go to the controller and nowhere else.
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names of the running models."""
        return list((await self._post("/list_models", {}))["models"])

    async def template(self, model: str) -> Template:
        """The conversation template of a model, from the manifest of its run."""
        name = (await self._post("/worker_get_conv_template", {"model": model}))["conv"]["name"]
        try:
            return get_template(str(name))
        except UserError:
            raise PageError("worker_failed") from None

    async def image_mode(self, model: str) -> str:
        """How the model makes an image square: ``pad`` or ``square``."""
        return str((await self._post("/model_details", {"model": model})).get("image_mode", "pad"))

    async def image_mean(self, model: str) -> tuple[float, float, float]:
        """The mean color of the model (0 to 1), which normalizes to zero; gray if its worker does not report one."""
        details = await self._post("/model_details", {"model": model})
        red, green, blue = details.get("image_mean") or (0.5, 0.5, 0.5)
        return float(red), float(green), float(blue)

    async def shows_attention(self, model: str) -> bool:
        """True if the model's worker can compute occlusion maps. Workers for other servers cannot."""
        try:
            details = await self._post("/model_details", {"model": model})
        except PageError:
            return False
        return int(details.get("image_tokens") or 0) > 0

    async def attention(self, exchange: Exchange) -> AsyncGenerator[dict[str, Any], None]:
        """Compute an occlusion map: how much each piece of an answer depended on each part of the image.

        Yields messages of ``protocol.AttentionProgress``, then one of ``protocol.AttentionReply``. Closing the
        generator cancels the work in the engine.

        Raises:
            PageError: the request was refused or broke off.
        """
        body = {
            "stream": True,
            "model": exchange.model,
            "prompt": exchange.prompt,
            "answer": exchange.answer,
            "images": [base64.b64encode(exchange.view.png).decode()],
        }
        try:
            async with self._http.stream("POST", ATTENTION_PATH, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise refusal_of(response)
                async with aclosing(read_messages(response)) as messages:
                    async for message in messages:
                        yield message
        except ApiError as error:
            raise _page_error(error) from None
        except ValueError:
            raise PageError("worker_lost") from None
        except httpx.HTTPError as error:
            raise _transport_error(error, has_begun=False) from None

    async def answer(
        self, exchange: Exchange, turns: Sequence[Turn], agreement: int | None = None
    ) -> AsyncIterator[None]:
        """Fill ``exchange`` with the model's answer. Yields after each change.

        ``agreement``: number of additional answers to sample; ``exchange.certainty`` then compares them.

        Leaving the iteration, or ``exchange.stop_requested``, closes the connection, which stops the model.

        Raises:
            PageError: the request was refused or broke off. ``exchange.answer`` keeps the text received so far.
        """
        exchange.turns = tuple(turns)
        template = await self.template(exchange.model)
        exchange.prompt = prompt_text(render_prompt(turns, template))
        sampling = exchange.sampling
        body = {
            "model": exchange.model,
            "prompt": exchange.prompt,
            "turns": [{"role": turn.role, "text": turn.text} for turn in turns],
            "images": [base64.b64encode(exchange.view.png).decode()],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "stop": template.stop,
            "echo": False,
            "familiarity": True,
            "confidence": True,
            "agreement": agreement,
        }
        try:
            async with open_llava_stream(self._http, body) as stream:
                async for _ in _read(stream, exchange):
                    yield
        except ApiError as error:
            raise _page_error(error) from None
        except httpx.HTTPError as error:
            raise _transport_error(error, has_begun=bool(exchange.answer)) from None

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = await self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise _transport_error(error, has_begun=False) from None
        if response.status_code != 200:
            raise _page_error(refusal_of(response))
        return dict(response.json())


async def _read(stream: LlavaStream, exchange: Exchange) -> AsyncIterator[None]:
    """Read deltas until the stream ends or the user stops it. Yields at most every ``POLL_S`` seconds."""
    last_update = 0.0
    changed = False
    while True:
        try:
            delta = await stream.next(POLL_S)
        except EndOfAnswer:
            # Workers of the original LLaVA send no finish reason. A stream that ends without an error is complete.
            exchange.ended = exchange.ended or "stop"
            if changed:
                yield
            return
        except ValueError:
            raise PageError("worker_lost") from None
        if exchange.stop_requested:
            exchange.ended = "stopped"
            return
        if delta is not None:
            exchange.answer += delta.text
            exchange.certainty |= delta.certainty
            changed = changed or bool(delta.text)
            exchange.ended = delta.finish_reason or exchange.ended
            if delta.error is not None:
                raise _page_error(delta.error)
        if changed and time.monotonic() - last_update >= POLL_S:
            yield
            last_update, changed = time.monotonic(), False


def _page_error(error: ApiError) -> PageError:
    return PageError(error.code, retry_after_s=error.retry_after_s)


def _transport_error(error: httpx.HTTPError, *, has_begun: bool) -> PageError:
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return PageError("no_controller")
    if isinstance(error, httpx.TimeoutException):
        return PageError("silent")
    return PageError("worker_lost" if has_begun else "silent")
