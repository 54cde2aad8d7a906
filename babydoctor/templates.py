"""Conversation templates: the text around the turns, and the control tokens that this text needs.

``plain``, ``llava_llama_2``, ``llama_2``, ``v1`` and ``mistral_instruct`` match the original LLaVA code (release 1.2,
``llava/conversation.py``) exactly, so checkpoints that were trained with it give the same answers here. ``mistral``,
``llama_3`` and ``chatml`` match the chat templates that are published with these models:

- ``mistral``: mistralai/Mistral-7B-Instruct-v0.2. LLaVA's ``mistral_instruct`` differs: it writes a space before
  ``</s>``, none after it, and marks the system prompt.
- ``llama_3``: meta-llama/Meta-Llama-3-8B-Instruct, with the system prompt that LLaVA-NeXT uses.
- ``chatml``: Qwen/Qwen2-7B-Instruct. The line break after the last answer is not written: nothing follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from babydoctor.schema import UserError

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
    strips_text: bool = False
    """White space around system prompts, questions and answers is removed."""
    end_tokens: tuple[str, ...] = ()
    """Tokens of the tokenizer that end an answer. Empty: the answer ends with ``stop``, which is plain text."""
    turn_tokens: tuple[str, ...] = ()
    """Further tokens of the tokenizer that begin a turn."""
    plain_markers: tuple[str, ...] = ()
    """Markers that the model reads as plain text, so the tokenizer must not hold them as tokens."""
    begin: str = ""
    """The begin-of-sequence token as clients may write it in front of a rendered prompt."""


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
        end_tokens=("</s>",),
        turn_tokens=("<s>",),
    )


_PLAIN = Template("plain", "", "", "", "", "", "{answer}\n", "\n", keeps_user_text=False)

_V1 = Template(
    name="v1",
    system=V1_SYSTEM,
    opening="{system} USER: ",
    opening_without_system="USER: ",
    next_opening="USER: ",
    reply_cue=" ASSISTANT:",
    reply=" {answer}</s>",
    stop="</s>",
    end_tokens=("</s>",),
)

_MISTRAL_INSTRUCT = Template(
    name="mistral_instruct",
    system="",
    opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
    opening_without_system="[INST] ",
    next_opening="[INST] ",
    reply_cue=" [/INST]",
    reply=" {answer} </s>",
    stop="</s>",
    end_tokens=("</s>",),
    plain_markers=("[INST]", "[/INST]"),
    begin="<s>",
)

_MISTRAL = Template(
    name="mistral",
    system="",
    opening="[INST] {system}\n\n",
    opening_without_system="[INST] ",
    next_opening=" [INST] ",
    reply_cue=" [/INST]",
    reply=" {answer}</s>",
    stop="</s>",
    end_tokens=("</s>",),
    plain_markers=("[INST]", "[/INST]"),
    begin="<s>",
)

_LLAMA_3 = Template(
    name="llama_3",
    system=LLAVA_SYSTEM,
    opening="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
    opening_without_system="<|start_header_id|>user<|end_header_id|>\n\n",
    next_opening="<|start_header_id|>user<|end_header_id|>\n\n",
    reply_cue="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    reply="{answer}<|eot_id|>",
    stop="<|eot_id|>",
    strips_text=True,
    end_tokens=("<|eot_id|>",),
    turn_tokens=("<|start_header_id|>", "<|end_header_id|>"),
    begin="<|begin_of_text|>",
)

_CHATML = Template(
    name="chatml",
    system="You are a helpful assistant.",
    opening="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
    opening_without_system="<|im_start|>user\n",
    next_opening="\n<|im_start|>user\n",
    reply_cue="<|im_end|>\n<|im_start|>assistant\n",
    reply="{answer}<|im_end|>",
    stop="<|im_end|>",
    end_tokens=("<|im_end|>",),
    turn_tokens=("<|im_start|>",),
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _PLAIN,
        _llama_2("llava_llama_2", LLAVA_SYSTEM),
        _llama_2("llama_2", LLAMA_2_SYSTEM),
        _V1,
        _MISTRAL_INSTRUCT,
        _MISTRAL,
        _LLAMA_3,
        _CHATML,
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
    """True for text such as ``[INST]`` that separates turns in one of the templates, but not for a word (``user``)."""
    fields = ("opening", "opening_without_system", "next_opening", "reply_cue", "reply", "stop")
    marker = text.strip()
    if not marker or marker.isalnum():
        return False
    return any(text in getattr(t, field) for t in TEMPLATES.values() for field in fields)
