"""Generated sections of Markdown files, between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

import re
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


def write_section(path: Path, name: str, text: str, *, option: str = "--update") -> None:
    """Replace the text between the markers of a section.

    Raises:
        UserError: the file or its markers do not exist.
    """
    before, _, after = _split(path, name, option)
    path.write_text(f"{before}\n{text.strip()}\n{after}", encoding="utf-8")


def _split(path: Path, name: str, option: str) -> tuple[str, str, str]:
    """The file up to and including the begin marker, the section, and the rest."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    text = path.read_text(encoding="utf-8")
    found = re.search(f"({re.escape(begin)})(.*?)({re.escape(end)})", text, re.DOTALL)
    if found is None:
        raise UserError(f"{option} {path}: the markers {begin} and {end} are missing; add them")
    return text[: found.end(1)], found[2], text[found.start(3) :]
