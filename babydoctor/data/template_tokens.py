"""Check that a tokenizer holds the control tokens of a conversation template.

A marker that is not a token of the tokenizer is encoded as plain text. Training would then supervise these characters
and never the token that ends an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from babydoctor.data.text_tokenizer import encode_text
from babydoctor.schema import Segment, UserError
from babydoctor.templates import TEMPLATES, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RETRAIN = "train it again with data.template={template}"
"""Fix for a run whose tokenizer lacks the tokens of the template that it was trained with."""


def end_token_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that end an answer in the template. Tokens that the tokenizer lacks are left out."""
    backend = tokenizer.backend_tokenizer
    ids = (backend.token_to_id(token) for token in template.end_tokens)
    return frozenset(token_id for token_id in ids if token_id is not None)


def check_template(
    template: Template, tokenizer: PreTrainedTokenizerBase, source: str, *, fix: str = "set data.template={template}"
) -> None:
    """Check that the tokenizer has the template's control tokens.

    Args:
        source: directory or hub id of the tokenizer, for the error.
        fix: what the user can do; ``{template}`` stands for the template that fits.

    Raises:
        UserError: a token is missing, or a marker that is plain text in the template is a token.
    """
    fault = _fault(template, tokenizer)
    if fault is None:
        return
    fitting = [t.name for t in TEMPLATES.values() if t.end_tokens and _fault(t, tokenizer) is None]
    if fitting:
        advice = fix.format(template=fitting[0])
        advice += f" (also fit: {', '.join(fitting[1:])})" if fitting[1:] else ""
    else:
        advice = "none of the templates fits this tokenizer; use another base model"
    raise UserError(f"the tokenizer of {source} {fault}; {advice}")


def _fault(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What does not fit, or None."""
    for tokens, use in ((template.end_tokens, "ends answers with"), (template.turn_tokens, "begins turns with")):
        for token in tokens:
            if not _is_token(token, tokenizer):
                return f"has no token {token} that template {template.name} {use}"
    for marker in template.plain_markers:
        if marker in tokenizer.get_added_vocab():
            return f"holds {marker} as a token, but template {template.name} writes it as plain text"
    return None


def _is_token(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if this text of a template is encoded as the token of that name, also between other text."""
    token_id = tokenizer.backend_tokenizer.token_to_id(text)
    if token_id is None:
        return False
    ids, _ = encode_text((Segment("a"), Segment(text, control=True), Segment("a")), tokenizer)
    return token_id in ids
