"""A measured table: printed, and written between its markers in a guide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def print_table(measure: Callable[[], str], section: str, guide: Path | None, *, option: str = "--update") -> None:
    """Measure, print the table and write it to ``guide``. A guide without the markers is refused before measuring.

    Raises:
        UserError: the file that ``option`` names is not there or lacks the markers.
    """
    from babydoctor.markers import read_section, write_section

    if guide is not None:
        read_section(guide, section, option=option)
    table = measure()
    print(table)
    if guide is not None:
        write_section(guide, section, table, option=option)
        print(f"updated: {guide}")
