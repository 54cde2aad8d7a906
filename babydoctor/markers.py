"""Generated parts of Markdown files: tables, and sections from ``<!-- NAME: begin -->`` to ``<!-- NAME: end -->``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from babydoctor.schema import UserError


def read_section(path: Path, name: str, *, option: str = "--update") -> str:
    """The text between the markers of a section.

    Args:
        option: the command-line option that named the file, for error messages.

    Raises:
        UserError: the file or its markers do not exist.
    """
    return _split(path, name, option)[1].strip("\n")


def has_section(path: Path, name: str) -> bool:
    """True if the file exists and has the markers of the section."""
    return path.is_file() and _find(path.read_text(encoding="utf-8"), name) is not None


def write_section(path: Path, name: str, text: str, *, option: str = "--update") -> None:
    """Replace the text between the markers of a section.

    Raises:
        UserError: the file or its markers do not exist.
    """
    before, _, after = _split(path, name, option)
    path.write_text(f"{before}\n{text.strip()}\n{after}", encoding="utf-8")


def _split(path: Path, name: str, option: str) -> tuple[str, str, str]:
    """The file up to and including the begin marker, the section, and the rest."""
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file; give an existing Markdown file")
    text = path.read_text(encoding="utf-8")
    found = _find(text, name)
    if found is None:
        begin, end = markers(name)
        raise UserError(f"{option} {path}: the markers {begin} and {end} are missing; add them")
    return text[: found.end(1)], found[2], text[found.start(3) :]


def markers(name: str) -> tuple[str, str]:
    """The lines that begin and end a section."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _find(text: str, name: str) -> re.Match[str] | None:
    """The begin marker, the section and the end marker as groups."""
    begin, end = (re.escape(marker) for marker in markers(name))
    return re.search(f"({begin})(.*?)({end})", text, re.DOTALL)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
