"""Tables of ``babydoctor eval`` and ``babydoctor eval compare`` in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from babydoctor.eval.conditions import condition_label
from babydoctor.eval.reporting.report import count_asked, headline_figures


def print_result(result: dict[str, Any]) -> None:
    """Print the headline figures under each image condition, the baselines and the notes."""
    shown = headline_figures(result)
    title = f"{result['task']}, {count_asked(result)}"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("")
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    for condition, scored in result["conditions"].items():
        cells = [_with_interval(scored["figures"].get(name)) for name in shown]
        table.add_row(f"[bold]{condition_label(condition, result['num_images'])}[/]", *cells)
    for name, values in result["baselines"].items():
        table.add_row(escape(name), *(_plain(values.get(figure)) for figure in shown), style="dim")
    console = Console()
    console.print(table)
    for note in [*result["notes"], *result["leakage"]["notes"]]:
        console.print(f"note: {escape(note)}", style="yellow")


def print_comparison(result: dict[str, Any]) -> None:
    """Print the figures of two evaluations, their differences, p-values and the number of equal answers."""
    table = Table(box=None, pad_edge=False)
    for name in (f"{result['num_questions']} questions", "A", "B", "B - A [95%]", "p"):
        table.add_column(name.replace("[", "\\["), justify="left" if "questions" in name else "right")
    for name, entry in result["figures"].items():
        p_value = entry["p_value"]
        table.add_row(
            name.replace("_", " "),
            _plain(entry["a"]),
            _plain(entry["b"]),
            _with_interval(entry),
            "-" if p_value is None else f"{p_value:.4f}",
        )
    Console().print(table)
    print(f"{result['num_same_answers']} of {result['num_questions']} answers are the same")


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    if entry["low"] is None:
        return _plain(entry["value"])
    return f"{_plain(entry['value'])} \\[{_plain(entry['low'])}, {_plain(entry['high'])}]"
