"""Writes the figures of an evaluation into the table of MODEL_CARD.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from babydoctor.eval.reporting.report import headline_figures
from babydoctor.markers import read_section, write_section

SECTION = "eval figures"
_HEAD = "| Task | Run | Figure | Value [95% interval] | Best constant answer | Shuffled images | Questions |"
_RULE = "|---|---|---|---|---|---|---|"


def table_rows(result: Mapping[str, Any]) -> list[str]:
    """One row per headline figure."""
    right = result["conditions"]["right"]["figures"]
    shuffled = result["conditions"].get("shuffled", {}).get("figures", {})
    name = result["run"]["manifest"]["name"] if result["run"] else Path(str(result["predictions"])).name
    rows = []
    for figure in headline_figures(result):
        entry = right[figure]
        interval = "" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]"
        constants = [values[figure] for values in result["baselines"].values() if values.get(figure) is not None]
        best = f"{max(constants):.3f}" if constants else "–"
        other = shuffled.get(figure, {}).get("value")
        rows.append(
            f"| {result['task']} | {name} | {figure.replace('_', ' ')} | {entry['value']:.3f}{interval} | {best} | "
            f"{'–' if other is None else f'{other:.3f}'} | {entry['num_questions']} |"
        )
    return rows


def update_model_card(path: Path, result: Mapping[str, Any]) -> None:
    """Replace the rows of this task and run in the table between the markers. Other rows stay.

    Raises:
        UserError: the file or its markers do not exist.
    """
    option = "--update-model-card"
    new = table_rows(result)
    own = tuple({"|".join(row.split("|")[:3]) for row in new})
    lines = read_section(path, SECTION, option=option).splitlines()
    kept = [line for line in lines if line.startswith("|") and line not in (_HEAD, _RULE) and not line.startswith(own)]
    write_section(path, SECTION, "\n".join([_HEAD, _RULE, *kept, *new]), option=option)
