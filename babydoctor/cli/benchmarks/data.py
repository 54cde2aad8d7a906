"""``babydoctor bench data``: startup cost of the forms of data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from babydoctor.cli.benchmarks.guide_table import print_table

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

    with tempfile.TemporaryDirectory() as folder:
        print_table(lambda: bench_data(Path(folder), rows), SECTION, update)
