"""Convert messages of OpenAI's APIs to turns of a conversation and its image."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import unquote, unquote_to_bytes

from pydantic import Field, model_validator

from babydoctor.conversation import Template, prompt_text, render_continuation, render_prompt
from babydoctor.schema import IMAGE_TOKEN, Turn, UserError
from babydoctor.serve.api.errors import ApiError, code_of_user_error
from babydoctor.serve.api.protocol import Body, PromptTurn, Text

FetchImage = Callable[[str], Awaitable[bytes]]

MAX_MESSAGES = 256


class ImageUrl(Body):
    url: str = Field(description="`data:image/png;base64,...`, or an http(s) URL if the operator allows the host.")
    detail: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError('must be an object, {"url": "data:image/png;base64,..."}, not a string')
        return value


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None


@dataclass(frozen=True, slots=True)
class ChatConversation:
    """Messages as turns, with the images as base64. ``system`` None: the template's own."""

    system: str | None
    turns: list[Turn]
    images: list[str]

    @property
    def continues(self) -> bool:
        """True if the last message is the assistant's; the answer then continues it."""
        return bool(self.turns) and self.turns[-1].role == "assistant"

    def generate_fields(self, template: Template) -> dict[str, Any]:
        """The fields of ``GenerateRequest`` that hold the conversation.

        Raises:
            ApiError: the turns do not alternate.
        """
        render = render_continuation if self.continues else render_prompt
        try:
            prompt = prompt_text(render(self.turns, template, system=self.system))
        except UserError as error:
            raise ApiError(code_of_user_error(error), f"{error}.", param="messages") from None
        return {
            "prompt": prompt,
            "images": self.images,
            "continues": self.continues,
            "system": self.system,
            "turns": [PromptTurn(role=turn.role, text=turn.text) for turn in self.turns],
        }


async def read_messages(messages: Sequence[Message], fetch: FetchImage) -> ChatConversation:
    """Messages -> turns. Neighboring messages of one role become one turn.

    Raises:
        ApiError: a message is not supported or invalid; the error names the fault.
    """
    systems: list[str] = []
    turns: list[Turn] = []
    urls: list[str] = []
    for message in messages:
        text, images = _content(message)
        if message.role in ("system", "developer"):
            if images or turns:
                fault = "holds an image" if images else "comes after a user's message"
                raise ApiError("bad_messages", f"A system message {fault}.", param="messages")
            systems.append(text)
            continue
        if images and message.role == "assistant":
            raise ApiError("bad_messages", "An assistant's message holds an image.", param="messages")
        # Training puts the image before the text, on a separate line.
        text = f"{IMAGE_TOKEN}\n" * len(images) + text
        urls += images
        if turns and turns[-1].role == message.role:
            turns[-1] = Turn(turns[-1].role, f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn("user" if message.role == "user" else "assistant", text))
    if len(urls) > 1:
        raise ApiError(
            "too_many_images",
            f"The conversation has {len(urls)} images; this model reads one per conversation. Start a new conversation "
            "for the other image.",
            param="messages",
        )
    images = [await _to_base64(url, fetch) for url in urls]
    return ChatConversation("\n".join(systems) if systems else None, turns, images)


def _content(message: Message) -> tuple[str, list[str]]:
    parts = message.content if isinstance(message.content, list) else []
    texts = (
        [message.content] if isinstance(message.content, str) else [p.text for p in parts if isinstance(p, TextPart)]
    )
    text = "\n".join(texts)
    if IMAGE_TOKEN in text and message.role != "assistant":  # an earlier answer is plain text
        raise ApiError(
            "bad_messages",
            f"A message contains {IMAGE_TOKEN!r}, which marks an image in prompts; remove it.",
            param="messages",
        )
    return text, [p.image_url.url for p in parts if isinstance(p, ImagePart)]


async def _to_base64(url: str, fetch: FetchImage) -> str:
    if url[:5].lower() != "data:":
        return base64.b64encode(await fetch(url)).decode()
    head, comma, data = url.partition(",")
    if not comma:
        raise ApiError("bad_data_url", "The image's data URL has no comma before its data.", param="messages")
    if head.replace(" ", "").lower().endswith(";base64"):
        return unquote(data)
    return base64.b64encode(unquote_to_bytes(data)).decode()
