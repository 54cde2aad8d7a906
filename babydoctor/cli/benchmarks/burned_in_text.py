"""``babydoctor bench burned-in-text``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from babydoctor.cli.benchmarks.guide_table import print_table


def measure_burned_in_text(
    guide: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="write the table between the markers of this file, for example babydoctor/imaging/README.md"),
    ] = None,
) -> None:
    """How many names, dates and numbers in pixels are hidden, false alarms, time per image. Needs the extra ocr."""
    from babydoctor.bench.burned_in_text import measure

    print_table(lambda: "\n".join(measure()), "burned-in text", guide, option="--guide")
