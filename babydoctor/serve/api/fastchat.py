"""FastChat's additions to the LLaVA protocol, for its ``openai_api_server`` and its controller.

Source: ``fastchat/conversation.py`` and ``fastchat/serve/openai_api_server.py``, release 0.2.36.
"""

from __future__ import annotations

from typing import Any

from babydoctor.conversation import Template
from babydoctor.schema import IMAGE_TOKEN
from babydoctor.serve.api.protocol import GenerateRequest

_IMAGE_PLACEHOLDER = "$$<image>$$"

# fastchat.conversation.SeparatorStyle
_ADD_COLON_TWO, _NO_COLON_SINGLE, _LLAMA2 = 2, 4, 7


def conversation_fields(template: Template) -> dict[str, Any]:
    """The template as FastChat's ``Conversation``, whose prompts are then ours to the character, and our own fields."""
    return {
        "name": template.name,
        "system_message": template.system,
        "messages": [],
        "offset": 0,
        "stop_str": template.stop,
        "stop_token_ids": None,
        **_style(template),
        "opening": template.opening,
        "next_opening": template.next_opening,
        "reply_cue": template.reply_cue,
    }


def _style(template: Template) -> dict[str, Any]:
    if not template.keeps_user_text:
        return {
            "system_template": "",
            "roles": ["", ""],
            "sep_style": _NO_COLON_SINGLE,
            "sep": template.stop,
            "sep2": None,
        }
    # "[INST] <<SYS>>\n{system}..." or "{system} USER: ": FastChat puts the role and " " behind the system prompt.
    before, placeholder, after = template.opening.partition("{system}")
    if template.reply.startswith("{answer}"):  # ChatML and LLaMA-3: each turn is a role, a text and the same end
        user = template.opening_without_system
        end = template.reply.removeprefix("{answer}") + template.next_opening.removesuffix(user)
        return {
            "system_template": before + "{system_message}" + after.removesuffix(user),
            "roles": [user, template.reply_cue.removeprefix(end)],
            "sep_style": _NO_COLON_SINGLE,
            "sep": end,
            "sep2": None,
        }
    if template.next_opening.endswith(": "):
        roles = [template.next_opening.removesuffix(": "), template.reply_cue.strip().removesuffix(":")]
        return {
            "system_template": "{system_message}",
            "roles": roles,
            "sep_style": _ADD_COLON_TWO,
            "sep": " ",
            "sep2": template.stop,
        }
    user, assistant = template.opening_without_system.strip(), template.reply_cue.strip()
    between = template.reply.partition("{answer}")[2] + template.next_opening.removesuffix(f"{user} ")
    return {
        "system_template": before + placeholder.replace("system", "system_message") + after,
        "roles": [user, assistant],
        "sep_style": _LLAMA2,
        "sep": " ",
        "sep2": between,
    }


def with_own_placeholders(request: GenerateRequest) -> GenerateRequest:
    """The request with FastChat's image placeholders replaced by ours, on a separate line as in training."""
    if _IMAGE_PLACEHOLDER not in request.prompt:
        return request
    return request.model_copy(update={"prompt": request.prompt.replace(_IMAGE_PLACEHOLDER, f"{IMAGE_TOKEN}\n")})
