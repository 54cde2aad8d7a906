"""``babydoctor bench data``: what forms of data cost at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

SECTION = "data formats"


def data(
    rows: Annotated[int, typer.Option(min=1, help="rows to generate")] = 1_000_000,
    update: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="write the table between its markers in this Markdown file"),
    ] = None,
) -> None:
    """Time to the first step's samples and memory per process: rows as JSON and in the converted form."""
    import tempfile

    from babydoctor.bench.data import bench_data
    from babydoctor.markers import read_section, write_section

    if update is not None:
        read_section(update, SECTION)  # before minutes of work
    with tempfile.TemporaryDirectory() as folder:
        table = bench_data(Path(folder), rows)
    print(table)
    if update is not None:
        write_section(update, SECTION, table)
        print(f"updated: {update}")
