"""``babydoctor bench burned-in-text``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def measure_burned_in_text(
    guide: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="write the table between the markers of this file, for example babydoctor/imaging/README.md"),
    ] = None,
) -> None:
    """How many names, dates and numbers in pixels are hidden, false alarms, time per image. Needs the extra ocr."""
    from babydoctor.bench.burned_in_text import measure
    from babydoctor.markers import write_section

    lines = measure()
    print("\n".join(lines))
    if guide is not None:
        write_section(guide, "burned-in text", "\n".join(lines), option="--guide")
