"""The table of a rehearsal, on the terminal and between the markers of the guide."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from babydoctor.bench.rehearse.context import Row
from babydoctor.bench.rehearse.sizes import GIB
from babydoctor.cores import num_cores
from babydoctor.schema import UserError

GUIDE = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- rehearse {size}: begin -->", "<!-- rehearse {size}: end -->"


def print_table(console: Console, rows: Sequence[Row]) -> None:
    """All commands and comparisons."""
    table = Table("command or comparison", box=None, pad_edge=False)
    for name in ("time", "peak GiB", "plan GiB"):
        table.add_column(name, justify="right")
    table.add_column("result", overflow="fold")
    for row in rows:
        style = "red" if not row.ok else "dim" if row.seconds is None else ""
        table.add_row(*_cells(row), style=style)
    console.print(table, markup=False)


def write_guide(size: str, rows: Sequence[Row], guide: Path = GUIDE) -> None:
    """Write the table between the markers of the size in the guide.

    Raises:
        UserError: the guide has no such markers.
    """
    begin, end = BEGIN.format(size=size), END.format(size=size)
    text = guide.read_text(encoding="utf-8") if guide.is_file() else ""
    if begin not in text or end not in text:
        raise UserError(f"{guide}: the lines {begin!r} and {end!r}, which the table goes between, are not there")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    failed = sum(not row.ok for row in rows)
    lines = [
        f"{num_cores()} cores ({platform.machine()}), {_memory_gib():.0f} GiB of memory; "
        f"{failed} of {len(rows)} lines failed.",
        "",
        "| command or comparison | time | peak GiB | plan GiB | result |",
        "|---|---|---|---|---|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in rows),
    ]
    guide.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}", encoding="utf-8")


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    return (
        row.label,
        "" if row.seconds is None else f"{row.seconds:.1f} s",
        "" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}",
        "" if row.plan_bytes is None else f"{row.plan_bytes / GIB:.2f}",
        ("" if row.ok else "FAILED: ") + row.note,
    )


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
