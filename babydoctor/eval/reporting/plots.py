"""Plots, as inline SVG or files. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

BLUE, ORANGE, GRAY, RED, GREEN = "#2463a8", "#d9822b", "#8a939c", "#b83232", "#2e7d4f"
CONDITION_COLORS = {"right": BLUE, "shuffled": ORANGE, "blank": GRAY, "noise": RED}


def new_figure(width: float, height: float) -> Canvas:
    """An empty figure (size in inches) that needs no display and no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height))
    FigureCanvasAgg(canvas)
    return canvas


def new_canvas(width: float, height: float) -> tuple[Canvas, Any]:
    """A figure (size in inches) with one set of axes in the report's plain style."""
    canvas = new_figure(width, height)
    canvas.set_layout_engine("constrained")
    axes = canvas.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return canvas, axes


def to_image_tag(canvas: Canvas, alt: str) -> str:
    """The figure as an ``<img>`` with inline data."""
    import html

    buffer = io.BytesIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="plot" alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def save(canvas: Canvas, path: Path) -> None:
    """Write the figure to a file. The suffix sets the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150)


def plot_groups(groups: Mapping[str, Mapping[str, Any]], figure: str, title: str, overall: float | None) -> Canvas:
    """One bar per value of a group, with interval and count. A line marks the figure over all questions."""
    names = [name for name in groups if groups[name].get(figure, {}).get("value") is not None]
    names.sort(key=lambda name: groups[name][figure]["num_questions"])
    canvas, axes = new_canvas(6.2, 0.9 + 0.32 * max(len(names), 1))
    for row, name in enumerate(names):
        entry = groups[name][figure]
        axes.barh(row, entry["value"], color=BLUE, height=0.62)
        if entry["low"] is not None:
            axes.plot([entry["low"], entry["high"]], [row, row], color="black", linewidth=1.2)
    axes.set_yticks(range(len(names)), [f"{name} (n={groups[name][figure]['num_questions']})" for name in names])
    if overall is not None:
        axes.axvline(overall, color=ORANGE, linewidth=1.2, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_title(title, fontsize=10, loc="left")
    return canvas


def plot_conditions(conditions: Mapping[str, Any], figures: Sequence[str]) -> Canvas:
    """Bars of a few figures under each image condition, with intervals."""
    canvas, axes = new_canvas(6.2, 3.0)
    width = 0.8 / max(len(conditions), 1)
    for number, (condition, scored) in enumerate(conditions.items()):
        for index, figure in enumerate(figures):
            entry = scored["figures"].get(figure)
            if entry is None or entry["value"] is None:
                continue
            x = index + (number - (len(conditions) - 1) / 2) * width
            color = CONDITION_COLORS.get(condition, GREEN)
            axes.bar(x, entry["value"], width * 0.92, color=color, label=condition if index == 0 else None)
            if entry["low"] is not None:
                axes.plot([x, x], [entry["low"], entry["high"]], color="black", linewidth=1.1)
    axes.set_xticks(range(len(figures)), [figure.replace("_", " ") for figure in figures])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return canvas


def plot_calibration(calibration: Mapping[str, Any]) -> Canvas:
    """Accuracy over confidence. A calibrated model lies on the diagonal. Dot size shows the number of answers."""
    canvas, axes = new_canvas(4.2, 3.4)
    bins = calibration["bins"]
    largest = max(entry["count"] for entry in bins)
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle="--")
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=BLUE, linewidth=1)
    sizes = [25 + 160 * entry["count"] / largest for entry in bins]
    axes.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], s=sizes, color=BLUE, clip_on=False)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    error = calibration["expected_calibration_error"]
    axes.set_title(f"expected calibration error {error:.3f}", fontsize=10, loc="left")
    return canvas


def plot_abstention(calibration: Mapping[str, Any]) -> Canvas:
    """Accuracy of the remaining answers when the least confident ones are withheld."""
    canvas, axes = new_canvas(4.2, 3.4)
    curve = calibration["abstention"]
    axes.plot([e["abstain"] for e in curve], [e["accuracy"] for e in curve], color=BLUE, marker="o", markersize=3)
    axes.axhline(curve[0]["accuracy"], color=GRAY, linewidth=1, linestyle="--")
    axes.set(xlabel="share that abstains", ylabel="accuracy of the rest", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("yes/no answers, least sure first", fontsize=10, loc="left")
    return canvas
