"""Conversation templates: turns -> text segments, each marked supervised or not. Pure.

This module alone decides which text is supervised. Later code does not search for answers in the text.

The templates match those of the original LLaVA code (release 1.2, ``llava/conversation.py``) exactly, so checkpoints
that were trained with it give the same answers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from babydoctor.schema import IMAGE_TOKEN, Segment, Turn, UserError

LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, slots=True)
class Template:
    """A conversation as text: ``opening(system) user reply_cue reply | next_opening user reply_cue reply | ...``.

    Only ``reply`` is supervised. It holds the answer and the marker that ends it, so the model learns to stop. The
    begin-of-sequence token is not part of the text; ``tokens.encode`` adds it.

    The template's own text may hold control tokens (``</s>``). System prompt, questions and answers are kept in
    separate segments, in which the same characters are plain text.
    """

    name: str
    system: str
    opening: str
    """Text before the first user turn; ``{system}`` stands for the system prompt."""
    opening_without_system: str
    next_opening: str
    reply_cue: str
    reply: str
    """``{answer}`` stands for the assistant's text."""
    stop: str
    """Generation ends before this text."""
    keeps_user_text: bool = True
    """False for ``plain``, which keeps the image of the user turn and drops its text."""


def _llama_2(name: str, system: str) -> Template:
    return Template(
        name=name,
        system=system,
        opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        opening_without_system="[INST] ",
        next_opening="<s>[INST] ",
        reply_cue=" [/INST]",
        reply=" {answer} </s>",
        stop="</s>",
    )


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("plain", "", "", "", "", "", "{answer}\n", "\n", keeps_user_text=False),
        _llama_2("llava_llama_2", LLAVA_SYSTEM),
        _llama_2("llama_2", LLAMA_2_SYSTEM),
        Template("v1", V1_SYSTEM, "{system} USER: ", "USER: ", "USER: ", " ASSISTANT:", " {answer}</s>", "</s>"),
    )
}


def get_template(name: str) -> Template:
    """Look up a template by name.

    Raises:
        UserError: no template has that name.
    """
    if name not in TEMPLATES:
        raise UserError(f"no conversation template is named {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def is_template_marker(text: str) -> bool:
    """True for text such as ``[INST]`` that separates turns in one of the templates."""
    fields = ("opening", "opening_without_system", "next_opening", "reply_cue", "reply", "stop")
    return bool(text.strip()) and any(text in getattr(t, field) for t in TEMPLATES.values() for field in fields)


def split_images(text: str, *, control: bool = True) -> tuple[Segment, ...]:
    """Split text at each ``IMAGE_TOKEN`` into unsupervised text and image segments; empty text is omitted.

    Args:
        control: True for a rendered prompt, whose ``</s>`` are control tokens; False for text that users wrote.
    """
    segments: list[Segment] = []
    for index, piece in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            segments.append(Segment(IMAGE_TOKEN, is_image=True))
        if piece:
            segments.append(Segment(piece, control=control))
    return tuple(segments)


def render(turns: Sequence[Turn], template: Template, *, system: str | None = None) -> tuple[Segment, ...]:
    """Render a finished conversation for training: user and assistant alternate, and the last turn is the assistant's.

    Args:
        system: replaces the template's system prompt; an empty string leaves it out.

    Raises:
        UserError: the turns are not in that order, ``plain`` gets more than one exchange, or the template has no
            place for ``system``.
    """
    _check_order(turns, last="assistant")
    if system and "{system}" not in template.opening:
        raise UserError(
            f"the template {template.name!r} has no system prompt, but this conversation has its own: "
            f"{system[:60]!r}; use {'llava_llama_2'!r}, or leave it out"
        )
    if not template.keeps_user_text and len(turns) != 2:
        raise UserError(
            f"the template {template.name!r} holds one user turn and one reply, but the conversation has "
            f"{len(turns)} turns; use {'llava_llama_2'!r} for conversations"
        )
    return tuple(_segments(turns, template, system))


def render_prompt(turns: Sequence[Turn], template: Template, *, system: str | None = None) -> tuple[Segment, ...]:
    """Render a conversation whose last turn is the user's, ready for the model to continue. Nothing is supervised.

    Raises:
        UserError: the turns do not alternate or do not end with the user.
    """
    _check_order(turns, last="user")
    return tuple(replace(segment, supervised=False) for segment in _segments(turns, template, system))


def prompt_text(segments: Sequence[Segment]) -> str:
    """The text of the segments as one string, images as ``IMAGE_TOKEN``."""
    return "".join(segment.text for segment in segments)


def _segments(turns: Sequence[Turn], template: Template, system: str | None) -> list[Segment]:
    system = template.system if system is None else system
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            segments += _fill(template.reply, "{answer}", turn.text, supervised=True)
            continue
        if index:
            segments += _fill(template.next_opening)
        elif system and "{system}" in template.opening:
            segments += _fill(template.opening, "{system}", system)
        else:
            segments += _fill(template.opening_without_system)
        text = turn.text if template.keeps_user_text else IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN)
        segments += split_images(text, control=False)
        segments += _fill(template.reply_cue)
    return segments


def _fill(pattern: str, field: str = "", text: str = "", *, supervised: bool = False) -> list[Segment]:
    """The template's own text as control segments, with the user's ``text`` for ``field`` as a plain segment."""
    before, _, after = pattern.partition(field) if field else (pattern, "", "")
    parts = (
        Segment(before, supervised, control=True),
        Segment(text, supervised),
        Segment(after, supervised, control=True),
    )
    return [part for part in parts if part.text]


def _check_order(turns: Sequence[Turn], last: str) -> None:
    roles = [turn.role for turn in turns]
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(roles))]
    if not roles or roles != expected or roles[-1] != last:
        shown = ", ".join(roles[:6]) + (f", ... ({len(roles)} turns)" if len(roles) > 6 else "")
        raise UserError(
            f"a conversation alternates between user and assistant, begins with the user and ends with the {last}; "
            f"this one has {shown or 'no turns'}",
            code="conversation_order",
        )


def render_continuation(turns: Sequence[Turn], template: Template, *, system: str | None = None) -> tuple[Segment, ...]:
    """Render a conversation whose last turn is the beginning of the assistant's answer, for the model to continue.

    Raises:
        UserError: the turns do not alternate or do not end with the assistant.
    """
    _check_order(turns, last="assistant")
    before_answer = template.reply.partition("{answer}")[0]
    opening = [Segment(before_answer, control=True)] if before_answer else []
    return (*render_prompt(turns[:-1], template, system=system), *opening, Segment(turns[-1].text))


def parse_prompt(prompt: str, template: Template) -> tuple[str | None, list[Turn]]:
    """The inverse of ``render_prompt``, for clients of the LLaVA API, which send rendered prompts.

    Returns:
        The system prompt (None: the template's own; "": none) and the turns. The last turn is the user's.

    Raises:
        UserError: the prompt is not a conversation in this template.
    """
    if not template.keeps_user_text:
        return None, [Turn("user", prompt)]
    system, rest = _split_opening(prompt, template)
    before_answer, _, after_answer = template.reply.partition("{answer}")
    turns: list[Turn] = []
    pieces = rest.split(after_answer + template.next_opening)
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        question, cue, answer = piece.partition(template.reply_cue)
        if not cue or (is_last and answer.strip()) or (not is_last and not answer.startswith(before_answer)):
            raise _not_in_template(template)
        turns.append(Turn("user", question))
        if not is_last:
            turns.append(Turn("assistant", answer.removeprefix(before_answer)))
    return system, turns


def image_first(text: str) -> str:
    """Move ``<image>`` to the front, followed by a newline, as the original LLaVA code does before templating."""
    return (IMAGE_TOKEN + "\n" + text.replace(IMAGE_TOKEN, "").strip()).strip()


def move_image_first(prompt: str, template: Template) -> str:
    """Move the image of a rendered prompt to the front of the first question, as ``image_first`` does in training.

    A prompt that is not a conversation in the template, or that has several images, stays as it is.
    """
    if prompt.count(IMAGE_TOKEN) != 1 or not template.keeps_user_text:
        return prompt
    try:
        _, turns = parse_prompt(prompt, template)
    except UserError:
        return prompt
    question = turns[0].text
    if IMAGE_TOKEN not in question or question.lstrip().startswith(IMAGE_TOKEN):
        return prompt
    return prompt.replace(question, image_first(question))


def _split_opening(prompt: str, template: Template) -> tuple[str | None, str]:
    before, _, after = template.opening.partition("{system}")
    own = template.opening.replace("{system}", template.system)
    if prompt.startswith(own):
        return None, prompt.removeprefix(own)
    # The system prompt of v1 is everything before the first "USER: ".
    if prompt.startswith(template.opening_without_system) and not (before and prompt.startswith(before)):
        return "", prompt.removeprefix(template.opening_without_system)
    system, found, rest = prompt.removeprefix(before).partition(after)
    if not prompt.startswith(before) or not found:
        raise _not_in_template(template)
    return system, rest


def _not_in_template(template: Template) -> UserError:
    return UserError(
        f"the prompt is not a conversation in the template {template.name!r}, so it cannot be sent as messages",
        code="prompt_format",
    )
