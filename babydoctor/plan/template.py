"""Check before a stage starts that the base model's tokenizer has the tokens of the conversation template."""

from __future__ import annotations

from pathlib import Path

from babydoctor.conversation import get_template
from babydoctor.data.template_tokens import check_template
from babydoctor.data.tokens import load_tokenizer
from babydoctor.hub import model_commit
from babydoctor.schema import UserError

LLAMA_2_IDS = "meta-llama/Llama-2-"
LLAMA_2_TOKENS = {"<s>", "</s>"}
"""Control tokens that every model with such an id has."""


def check_base_template(template: str, language_model: str) -> str:
    """Check a template against a base model whose tokenizer is on this disk.

    Args:
        language_model: directory or hub id.

    Returns:
        "" if they fit, else a sentence that says why this is not known yet.

    Raises:
        UserError: the tokenizer lacks a token of the template.
    """
    chosen = get_template(template)
    later = f"the tokenizer of {language_model} is not on this disk: data.template={template} is checked by `train`"
    if not Path(language_model).is_dir() and model_commit(language_model) is None:
        known = language_model.startswith(LLAMA_2_IDS) and {*chosen.end_tokens, *chosen.turn_tokens} <= LLAMA_2_TOKENS
        return "" if known else later
    try:
        tokenizer = load_tokenizer(language_model)
    except UserError:
        if Path(language_model).is_dir():
            raise
        return later  # the cache holds a part of the model, and the hub does not answer
    check_template(chosen, tokenizer, language_model)
    return ""
