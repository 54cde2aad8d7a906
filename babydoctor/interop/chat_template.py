"""BabyDoctor's conversation templates as Jinja chat templates, for software that renders prompts itself.

Content is a string or a list of parts. Images come first, each on its own line as in training, followed by the text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from babydoctor.conversation import Template
from babydoctor.schema import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_CPP_MARKER = "<__media__>"
"""llama.cpp replaces images with this text before it renders the template."""

# macro words(content): the text parts. macro images(content): one image token and a newline each.
_MACROS = """\
{%- macro words(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content if part.type == 'text'TEXT_ONLY -%}
{{ '\\n' if not loop.first }}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro images(content) -%}
{%- if content is not string -%}{%- for part in content if IS_IMAGE -%}
{{ IMAGE }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""

_BODY = """\
{%- set first = 1 if messages[0].role == 'system' else 0 -%}
{%- set system = words(messages[0].content)STRIP if first else DEFAULT_SYSTEM -%}
{{ BOS }}
{%- for message in messages[first:] -%}
{%- if message.role == 'user' -%}
{%- if loop.first -%}{%- if system -%}{{ BEFORE_SYSTEM }}{{ system }}{{ AFTER_SYSTEM }}
{%- else -%}{{ WITHOUT_SYSTEM }}{%- endif -%}
{%- else -%}{{ NEXT_OPENING }}{%- endif -%}
USER{{ REPLY_CUE }}
{%- else -%}{{ BEFORE_ANSWER }}{{ words(message.content)STRIP }}{{ AFTER_ANSWER }}
{%- endif -%}
{%- endfor -%}
"""


def build_chat_template(template: Template, *, spaces: bool, has_begin: bool = True, llama_cpp: bool = False) -> str:
    """The Jinja text of a conversation template.

    Args:
        spaces: write the spaces that SentencePiece adds at the beginning of text and after an image. Needed if the
            tokenizer adds one only at the very beginning (``adds_prefix_everywhere`` is false).
        has_begin: the tokenizer has a begin-of-sequence token.
        llama_cpp: images are text parts that hold llama.cpp's marker, not parts of type image.
    """
    space = " " if spaces and template.keeps_user_text else ""
    line = "\n" if template.keeps_user_text else ""  # plain holds only the image
    before_system, _, after_system = template.opening.partition("{system}")
    before_answer, _, after_answer = template.reply.partition("{answer}")
    texts = {
        "IMAGE": f"part.text ~ {json.dumps(line)}" if llama_cpp else json.dumps(f"{IMAGE_TOKEN}{space}{line}"),
        "IS_IMAGE": f"part.text == '{LLAMA_CPP_MARKER}'"
        if llama_cpp
        else "part.type == 'image' or part.type == 'image_url'",
        "TEXT_ONLY": f" and part.text != '{LLAMA_CPP_MARKER}'" if llama_cpp else "",
        "USER": _user(template),
        "STRIP": " | trim" if template.strips_text else "",
        "DEFAULT_SYSTEM": json.dumps(template.system),
        "BOS": f"bos_token ~ {json.dumps(space)}" if has_begin else json.dumps(space),
        "BEFORE_SYSTEM": json.dumps(before_system if template.opening else ""),
        "AFTER_SYSTEM": json.dumps(after_system),
        "WITHOUT_SYSTEM": json.dumps(template.opening_without_system),
        "NEXT_OPENING": json.dumps(template.next_opening),
        "REPLY_CUE": json.dumps(template.reply_cue),
        "BEFORE_ANSWER": json.dumps(before_answer),
        "AFTER_ANSWER": json.dumps(after_answer),
    }
    return re.sub(rf"\b({'|'.join(texts)})\b", lambda match: texts[match[1]], _MACROS + _BODY)


def _user(template: Template) -> str:
    """What a user's turn writes."""
    if not template.keeps_user_text:
        return "{{ images(message.content) }}"
    if template.strips_text:
        return "{{ (images(message.content) ~ words(message.content)) | trim }}"
    return "{{ images(message.content) }}{{ words(message.content) }}"


def adds_prefix_everywhere(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer adds its prefix space after special tokens too, as LLaMA's did before the fix of 2023."""
    special = tokenizer.eos_token
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{special}a", add_special_tokens=False)["input_ids"][1:]
    return list(alone) == list(after)
