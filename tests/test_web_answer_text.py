"""Answers as HTML: Markdown is rendered, tags are text, and no word or sign is lost."""

from __future__ import annotations

import html
import random
import re

import pytest

from babydoctor.serve.page.conversation.answer_text import render_answer


@pytest.mark.parametrize(
    ("text", "shown", "hidden"),
    [
        ("a<b and c>d", "a&lt;b and c&gt;d", "<b"),
        ("[here](javascript:alert(1))", "[here](javascript:alert(1))", "href"),
        ("[here](JaVaScRiPt:alert(1)) <javascript:alert(2)>", "&lt;javascript:alert(2)&gt;", "href"),
        ("[x](data:text/html;base64,AAAA) [y](vbscript:z)", "[y](vbscript:z)", "href"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;", "<img"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;", "<script"),
        ("![image](https://example.org/a.png)", "!", "<img"),
        ("**bold** and `code`", "<strong>bold</strong> and <code>code</code>", "**"),
        ("- one\n- two", "<li>one</li>", "- one"),
        ("one\ntwo", "one<br>\ntwo", "one two"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "<td>1</td>", "|"),
        ("[site](https://example.org)", 'rel="noopener noreferrer nofollow"', "[site]"),
    ],
)
def test_markdown_is_rendered_and_html_is_text(text: str, shown: str, hidden: str):
    rendered = render_answer(text).replace("<br />", "<br>")
    assert shown in rendered and hidden not in rendered


@pytest.mark.parametrize(
    "text",
    [
        "A mass of 5*3*2 cm and one of 2**3 mm.",
        "> 5 mm",
        "# of the left 7th rib",
        "Findings\n---\nnone",
        "[T1]: bright",
        "1. one\n3. three",
        "~~no~~ fracture",
        r"No\}S \* mass",
        "&lt; 5 mm &amp; stable",
        "+ contrast",
        "| a | b |\n|---|---|\n| 1 | 2 | 3 |",
        "see <https://example.org>",
        'grade [3](4) and [x](https://example.org "4")',
    ],
)
def test_no_word_or_sign_is_lost(text: str):
    assert content(text) == content(as_read(render_answer(text)))


def test_no_word_or_sign_of_any_answer_is_lost():
    draw = random.Random(0)
    pieces = ["a", "5", "mm", " ", "  ", "\n", "\n\n", *"*_`~#>|+-<&;[](){}:!\\.", "1. ", "- ", "**", "&amp;", "\t"]
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 24)))
        assert content(text) == content(as_read(render_answer(text))), text


def content(text: str) -> list[str]:
    """Words, and signs other than full stops and the marks of emphasis, code, lists, tables and links."""
    return re.findall(r"[^\W_]+|[^\w\s*`|:.()\[\]-]", text)


def as_read(rendered: str) -> str:
    """What a browser shows, with list numbers, and with the targets of links behind them."""
    number = 0

    def shown(match: re.Match[str]) -> str:
        nonlocal number
        tag = match[0]
        if tag.startswith("<li"):
            value = re.search(r'value="(\d+)"', tag)
            return f"{value[1]} " if value else ""
        if tag.startswith(("</p", "<br", "</td", "</th", "</li", "</pre")):
            return "\n"
        return ""

    return html.unescape(re.sub(r"<[^>]*>", shown, rendered))
