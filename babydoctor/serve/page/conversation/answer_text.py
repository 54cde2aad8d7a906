"""A model's answer as HTML: Markdown where it costs no character that carries meaning, else the text as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

# These rules drop or change characters that mean something in a report: "> 5 mm", "# of the rib", a backslash.
_LOSSY_RULES = ["blockquote", "heading", "lheading", "reference", "escape", "entity", "strikethrough", "image"]

# Words, and signs other than the marks of emphasis, code, lists, tables and links.
_CONTENT = re.compile(r"[^\W_]+|[^\w\s*`|:()\[\]-]")


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("js-default", {"html": False, "linkify": False, "breaks": True}).disable(_LOSSY_RULES)
    parser.validateLink = lambda url: url.lower().startswith(("https://", "http://"))  # type: ignore[method-assign]

    def open_link(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        tokens[index].attrSet("target", "_blank")
        tokens[index].attrSet("rel", "noopener noreferrer nofollow")
        return str(renderer.renderToken(tokens, index, options, env))

    def open_item(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        if tokens[index].info:  # HTML counts on from the first number, whatever the text says
            tokens[index].attrSet("value", tokens[index].info)
        return str(renderer.renderToken(tokens, index, options, env))

    parser.add_render_rule("link_open", open_link)
    parser.add_render_rule("list_item_open", open_item)
    return parser


def render_answer(text: str) -> Markup:
    """Return ``text`` as safe HTML. Tags in it are shown as text; only http links are followed.

    Markdown reads "5*3*2 mm" as "532 mm" and drops a table's surplus cells. An answer in which any word or sign
    would be lost is shown as it is.
    """
    parser = _parser()
    tokens = parser.parse(text)
    if _CONTENT.findall(text) != _CONTENT.findall(_shown(tokens)):
        return Markup("<p>{}</p>").format(Markup("<br>").join(escape(text).splitlines()))
    return Markup(parser.renderer.render(tokens, parser.options, {}))


def _shown(tokens: Sequence[Token]) -> str:
    """What the parsed text says: its words, the numbers of lists, the languages of code and the targets of links."""
    parts: list[str] = []
    for token in tokens:
        if token.type == "inline":
            parts += [*_shown_inline(token.children or []), "\n"]
        elif token.type == "list_item_open" and token.info:
            parts.append(token.info + token.markup)
        elif token.type in ("fence", "code_block"):
            parts += [token.info, "\n", token.content]
    return "".join(parts)


def _shown_inline(tokens: Sequence[Token]) -> Iterator[str]:
    target = ""
    for token in tokens:
        if token.type == "link_open":
            target = str(token.attrs["href"])
        elif token.type == "link_close":
            yield f"({target})"
        else:
            yield "\n" if token.type in ("softbreak", "hardbreak") else token.content
