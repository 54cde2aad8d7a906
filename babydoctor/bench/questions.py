"""Questions with known greedy answers, and how requests for them end."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any

import httpx

from babydoctor.bench.endurance.soak import noise
from babydoctor.conversation import get_template, prompt_text, render_prompt
from babydoctor.schema import IMAGE_TOKEN, Turn, UserError
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.client import Client, open_llava_stream

NUM_QUESTIONS = 8

NUM_TOKENS = 48
"""New tokens of an answer: enough that some answers are in progress whenever a part is killed."""


@dataclass(frozen=True)
class Questions:
    """Questions, and the answers that an undisturbed server gave to them."""

    model: str
    template: str
    texts: tuple[str, ...]
    expected: tuple[str, ...]

    @classmethod
    def learn(cls, url: str) -> Questions:
        """Ask a server every question twice, first one by one, then all at once. Keep those with equal answers.

        Raises:
            UserError: no question has the same answer both times.
        """
        with Client(url) as client:
            model = client.models()[0]
            template = client.template(model)
        texts = tuple(f"Question {index}: what is seen?" for index in range(NUM_QUESTIONS))
        blank = cls(model, template, texts, ("",) * NUM_QUESTIONS)

        async def both() -> tuple[list[str], list[str]]:
            async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
                bodies = [blank.body(index) for index in range(NUM_QUESTIONS)]
                alone = [await _answer(http, url, body) for body in bodies]
                return alone, list(await asyncio.gather(*(_answer(http, url, body) for body in bodies)))

        alone, together = asyncio.run(both())
        kept = [index for index in range(NUM_QUESTIONS) if alone[index] == together[index]]
        if not kept:
            raise UserError("answers change with concurrent requests, so none can be checked; use float32 weights")
        return cls(model, template, tuple(texts[i] for i in kept), tuple(alone[i] for i in kept))

    def body(self, index: int, image: bytes | None = None) -> dict[str, Any]:
        """The request for a question, with its own image or another one."""
        turn = Turn("user", f"{IMAGE_TOKEN}\n{self.texts[index]}")
        image = noise(int(self.texts[index].split()[1].rstrip(":"))) if image is None else image
        return {
            "model": self.model,
            "prompt": prompt_text(render_prompt([turn], get_template(self.template))),
            "images": [base64.b64encode(image).decode()],
            "temperature": 0,
            "max_new_tokens": NUM_TOKENS,
            "stop": "</s>",
        }


async def _answer(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
    """The whole answer. Raises ``ApiError`` or ``httpx.HTTPError``."""
    text, is_complete = "", False
    async with open_llava_stream(http, body, url=url) as stream:
        async for delta in stream:
            if delta.error is not None:
                raise delta.error
            text += delta.text
            is_complete = is_complete or delta.finish_reason is not None
    if not is_complete:
        raise httpx.ReadError("the stream broke off")
    return text


async def ask(http: httpx.AsyncClient, url: str, questions: Questions, index: int) -> str:
    """How a question ended: ``right``, ``wrong``, ``refused STATUS``, ``lost with its worker``, ``connection lost``."""
    outcome, text = await _outcome(http, url, questions.body(index))
    return outcome or ("right" if text == questions.expected[index] else "wrong")


async def send_image(http: httpx.AsyncClient, url: str, questions: Questions, image: bytes) -> str:
    """How a question about a given file ended, ``right`` for any answer."""
    outcome, _ = await _outcome(http, url, questions.body(0, image) | {"max_new_tokens": 4})
    return outcome or "right"


async def _outcome(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[str, str]:
    try:
        return "", await _answer(http, url, body)
    except ApiError as error:
        is_loss = error.code in ("worker_lost", "draining")
        return ("lost with its worker" if is_loss else f"refused {error.status}"), ""
    except httpx.HTTPError:
        return "connection lost", ""
