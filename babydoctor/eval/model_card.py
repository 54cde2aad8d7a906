"""Figures of an evaluation, written into the table of MODEL_CARD.md between markers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from babydoctor.eval.report import headline_figures
from babydoctor.schema import UserError

BEGIN, END = "<!-- eval figures: begin -->", "<!-- eval figures: end -->"
_HEAD = "| Task | Run | Figure | Value [95% interval] | Best constant answer | Shuffled images | Questions |"
_RULE = "|---|---|---|---|---|---|---|"


def table_rows(result: Mapping[str, Any]) -> list[str]:
    """One row for each headline figure."""
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
    """Put the rows of this task and run into the table between the markers; other rows stay.

    Raises:
        UserError: the file or its markers are not there.
    """
    if not path.is_file():
        raise UserError(f"--update-model-card {path}: no such file")
    text = path.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    if found is None:
        raise UserError(f"--update-model-card {path}: the markers {BEGIN} and {END} are missing; put them in")
    new = table_rows(result)
    own = tuple({"|".join(row.split("|")[:3]) for row in new})
    kept = [line for line in found[1].splitlines() if line.startswith("|") and line not in (_HEAD, _RULE)]
    kept = [line for line in kept if not line.startswith(own)]
    table = "\n".join([BEGIN, _HEAD, _RULE, *kept, *new, END])
    path.write_text(text[: found.start()] + table + text[found.end() :], encoding="utf-8")
