"""Conversations: turns -> text segments, each marked supervised or not. Pure. The templates are in ``templates.py``.

This module alone decides which text is supervised. Later code does not search for answers in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from babydoctor.schema import IMAGE_TOKEN, Segment, Turn, UserError
from babydoctor.templates import TEMPLATES as TEMPLATES
from babydoctor.templates import Template as Template
from babydoctor.templates import get_template as get_template


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
    def strip(text: str) -> str:
        return text.strip() if template.strips_text else text

    system = strip(template.system if system is None else system)
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            segments += _fill(template.reply, "{answer}", strip(turn.text), supervised=True)
            continue
        if index:
            segments += _fill(template.next_opening)
        elif system and "{system}" in template.opening:
            segments += _fill(template.opening, "{system}", system)
        else:
            segments += _fill(template.opening_without_system)
        text = turn.text if template.keeps_user_text else IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN)
        segments += split_images(strip(text), control=False)
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

    A begin-of-sequence token in front is dropped, because the tokenizer adds it.

    Returns:
        The system prompt (None: the template's own, which may be none; "": none) and the turns. The last turn is the
        user's.

    Raises:
        UserError: the prompt is not a conversation in this template.
    """
    if not template.keeps_user_text:
        return None, [Turn("user", prompt)]
    if template.begin and prompt.startswith(template.begin):
        prompt = prompt.removeprefix(template.begin).lstrip(" ")
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

    A prompt that is not a conversation in the template, or that has several images, is returned unchanged.
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
    if template.system and prompt.startswith(own):
        return None, prompt.removeprefix(own)
    none = "" if template.system else None
    plain = template.opening_without_system
    if before == plain:
        # mistral: the system prompt is the first paragraph of the question. Only before an image is it certain that
        # this paragraph is no question.
        if not prompt.startswith(plain):
            raise _not_in_template(template)
        question = prompt.removeprefix(plain)
        system, found, rest = question.partition(after + IMAGE_TOKEN)
        is_system = found and template.reply_cue not in system
        return (system, IMAGE_TOKEN + rest) if is_system else (none, question)
    # The system prompt of v1 is everything before the first "USER: ".
    if prompt.startswith(plain) and not (before and prompt.startswith(before)):
        return none, prompt.removeprefix(plain)
    system, found, rest = prompt.removeprefix(before).partition(after)
    if not prompt.startswith(before) or not found:
        raise _not_in_template(template)
    return system, rest


def _not_in_template(template: Template) -> UserError:
    return UserError(
        f"the prompt is not a conversation in the template {template.name!r}, so it cannot be sent as messages",
        code="prompt_format",
    )
