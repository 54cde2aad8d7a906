"""A prompt back into turns: what ``conversation.render_prompt`` does, undone.

LLaVA's wire carries rendered prompts, OpenAI's carries messages. A worker that fronts an OpenAI server needs the way
back.
"""

from __future__ import annotations

from babydoctor.conversation import Template
from babydoctor.schema import Turn
from babydoctor.serve.api.errors import ApiError


def prompt_to_turns(prompt: str, template: Template) -> tuple[str | None, list[Turn]]:
    """Read a prompt that ends where the model has to go on.

    Returns:
        The system prompt (None: the template's own; "": none) and the turns, the user's last.

    Raises:
        ApiError: 422, the prompt is not in this template.
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
            raise _refusal(template)
        turns.append(Turn("user", question))
        if not is_last:
            turns.append(Turn("assistant", answer.removeprefix(before_answer)))
    return system, turns


def _split_opening(prompt: str, template: Template) -> tuple[str | None, str]:
    before, _, after = template.opening.partition("{system}")
    own = template.opening.replace("{system}", template.system)
    if prompt.startswith(own):
        return None, prompt.removeprefix(own)
    # v1's system prompt is whatever stands before the first "USER: ".
    if prompt.startswith(template.opening_without_system) and not (before and prompt.startswith(before)):
        return "", prompt.removeprefix(template.opening_without_system)
    system, found, rest = prompt.removeprefix(before).partition(after)
    if not prompt.startswith(before) or not found:
        raise _refusal(template)
    return system, rest


def _refusal(template: Template) -> ApiError:
    return ApiError(
        "bad_prompt",
        f"The prompt is not a conversation in the template {template.name!r}, so it cannot be told as messages.",
        param="prompt",
    )
