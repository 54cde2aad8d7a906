"""The demonstration's results: a table on the terminal and as Markdown, and a picture of cases with answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from babydoctor.demo.score import CONDITIONS, StageScore
from babydoctor.prepare.phantom_text import KINDS, read_answer
from babydoctor.schema import IMAGE_TOKEN

NUM_SHOWN = 8


def rows(scores: Sequence[StageScore]) -> list[list[str]]:
    """The table's rows: each stage under each condition, then chance."""
    table = []
    for score in scores:
        for condition in CONDITIONS:
            values = [score.accuracy[condition][kind] for kind in KINDS]
            cells = [f"{value:.1%}" for value in (*values, score.mean(condition))]
            terms = f"{score.radiology_terms:.0%}" if condition == "right" else ""
            table.append([score.name if condition == "right" else "", condition, *cells, terms])
    last = scores[-1]
    table.append(["chance", "", *[f"{last.chance[kind]:.1%}" for kind in KINDS], f"{last.mean_chance:.1%}", ""])
    return table


HEADER = ["after", "image", *KINDS, "mean", "radiology terms"]


def print_table(scores: Sequence[StageScore]) -> None:
    """Print the score table and what is compared in it."""
    table = Table(*HEADER, title=f"Exact answers on {scores[-1].num_cases} held-out phantoms")
    for row in rows(scores):
        table.add_row(*row, end_section=row[1] == CONDITIONS[-1])
    Console(width=110).print(table)
    before, last = scores[-2].answers, scores[-1].answers
    print("The same questions after two stages:")
    before, last = scores[-2], scores[-1]
    for old, new in list(zip(before.answers, last.answers, strict=True))[: len(KINDS)]:
        print(f"  {old['question'].replace(IMAGE_TOKEN, '').strip()}")
        print(f"    {before.name}: {old['given']}\n    {last.name}: {new['given']}")


def markdown(scores: Sequence[StageScore]) -> str:
    """The score table for README and MODEL_CARD."""
    lines = [HEADER, ["---"] * len(HEADER), *rows(scores)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw_cases(score: StageScore, phantoms: Path, path: Path) -> None:
    """Draw held-out cases with the questions and the run's answers, wrong ones marked."""
    from matplotlib.figure import Figure

    by_image: dict[str, list[dict[str, str]]] = {}
    for item in score.answers:
        by_image.setdefault(item["image"], []).append(item)
    # Four questions each, and as many modalities as there are: every other case in order.
    chosen = [image for image, items in by_image.items() if len(items) == len(KINDS)][:NUM_SHOWN]
    figure = Figure(figsize=(2.4 * NUM_SHOWN / 2, 7.4), layout="constrained")
    axes = figure.subplots(2, NUM_SHOWN // 2).flatten()
    for axis, image in zip(axes, chosen, strict=False):
        axis.imshow(Image.open(phantoms / "images" / image), cmap="gray")
        axis.set_axis_off()
        lines = []
        for item in by_image[image]:
            right = read_answer(item["kind"], item["given"])[0] == item["truth"]
            lines.append(f"{item['kind']}: {item['given']}" + ("" if right else f"  [wrong: {item['answer']}]"))
        wrong = any("[wrong" in line for line in lines)
        axis.set_title("\n".join(lines), fontsize=8, loc="left", color="firebrick" if wrong else "black")
    figure.suptitle(f"Held-out phantoms and the answers after {score.name}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
