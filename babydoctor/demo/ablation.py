"""Ablation of the stages: train with all of them and with each one left out, and score the results.

Runs that variants share, such as the first stage of "all stages" and "without radiology", are trained once. Finished
runs and scores are kept, so an interrupted ablation continues where it stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babydoctor.config import RunConfig, TaskConfig, load_config
from babydoctor.eval.ask import GenerationConfig
from babydoctor.eval.reporting import plots
from babydoctor.eval.run import EvalConfig, evaluate
from babydoctor.files import write_json, write_text
from babydoctor.markers import markdown_table
from babydoctor.schema import UserError

TINY_CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
TINY_STAGES = ("align", "instruct", "radiology")
SHOWN = (
    "closed_accuracy",
    "closed_accuracy_in_radiology_terms",
    "yes_no_balanced_accuracy",
    "open_token_f1",
    "rouge_l",
)
"""Figures in the table, if the task has them."""

SECTION = "stage ablation"
"""Name of the markers around the table in a Markdown file."""


@dataclass(frozen=True, slots=True)
class StagesConfig:
    """What to train and how to score it.

    Attributes:
        out: folder for runs, scores, table and plot.
        configs: configurations of the stages, in order; empty: the tiny preset on ``data`` and ``base``.
        runs: "LABEL=DIRECTORY" of existing runs to score instead of training. Equal labels are seeds of one variant.
        overrides: "KEY=VALUE" for all stages, or "STAGE:KEY=VALUE" for one.
    """

    out: Path
    configs: tuple[Path, ...] = ()
    runs: tuple[str, ...] = ()
    task: str = "phantom"
    data: Path = Path(".demo/phantoms")
    base: Path = Path(".demo/base")
    num_seeds: int = 3
    overrides: tuple[str, ...] = ()
    max_questions: int = 0


def variants(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The stages of each variant: all of them, and all but one."""
    result = {"all stages": tuple(names)}
    for left_out in names:
        result[f"without {left_out}"] = tuple(name for name in names if name != left_out)
    return result


def run_stages(config: StagesConfig) -> dict[str, Any]:
    """Train and score every variant with every seed. Writes ``stages.json``, ``.md`` and ``.png`` to ``config.out``."""
    config.out.mkdir(parents=True, exist_ok=True)
    runs = _given_runs(config) if config.runs else _train_all(config)
    rows: dict[str, list[dict[str, Any]]] = {}
    chance: dict[str, Any] | None = None
    for number, (label, run) in enumerate(runs):
        print(f"score: {label} ({run})", flush=True)
        result = _score(config, run, config.out / "scores" / (run.name if not config.runs else f"{number}-{run.name}"))
        chance = result["chance"]
        rows.setdefault(label, []).append({"run": str(run), **_row(result)})
    table = {
        "task": config.task,
        "num_seeds": max(len(seeds) for seeds in rows.values()),
        "variants": rows,
        "chance": chance["closed_accuracy"] if chance else None,
        "overrides": list(config.overrides),
        "num_questions": rows[next(iter(rows))][0]["num_questions"],
    }
    write_json(config.out / "stages.json", table)
    write_text(config.out / "stages.md", to_markdown(table))
    write_picture(config.out / "stages.png", table)
    return table


def _given_runs(config: StagesConfig) -> list[tuple[str, Path]]:
    runs = []
    for given in config.runs:
        label, equals, directory = given.partition("=")
        if not equals or not Path(directory).is_dir():
            raise UserError(f"--run {given}: give LABEL=DIRECTORY of a finished run")
        runs.append((label, Path(directory)))
    return runs


def _train_all(config: StagesConfig) -> list[tuple[str, Path]]:
    paths = config.configs or tuple(TINY_CONFIGS / f"{name}.yaml" for name in TINY_STAGES)
    if not config.configs:
        for needed in (config.data / "truth.jsonl", config.base / "llama", config.base / "clip"):
            if not needed.exists():
                raise UserError(
                    f"{needed} is missing; `babydoctor demo --check` makes phantoms and base models in .demo, or make "
                    "them with `babydoctor data phantom` and `babydoctor tiny-base` and give --data and --base"
                )
    names = [load_config(path).name for path in paths]
    by_name = dict(zip(names, paths, strict=True))
    runs = []
    for label, stages in variants(names).items():
        for seed in range(config.num_seeds):
            runs.append((label, _train_chain(config, by_name, stages, seed)))
    return runs


def _train_chain(config: StagesConfig, paths: dict[str, Path], stages: Sequence[str], seed: int) -> Path:
    """Train the stages one after the other, except finished ones. Returns the last run."""
    from babydoctor.train.loop import train

    run: Path | None = None
    for number, stage in enumerate(stages):
        here = config.out / "runs" / f"seed{seed}-{'-'.join(stages[: number + 1])}"
        if not (here / "manifest.json").is_file():
            print(f"train: {here}", flush=True)
            train(stage_config(config, paths[stage], stage, seed, here, run), resume=True)
        run = here
    assert run is not None, "an ablation needs at least two stages"
    return run


def stage_config(
    config: StagesConfig, path: Path, stage: str, seed: int, output: Path, init_from: Path | None
) -> RunConfig:
    """The configuration of one stage: its file with paths, seed and the user's overrides.

    Without ``init_from`` a stage starts from the base models of the first stage, with a new projector.
    """
    overrides = [f"output_dir={output}", f"train.seed={42 + seed}"]
    if not config.configs:
        overrides += [
            f"data.rows={config.data / f'{stage}_train.json'}",
            f"data.eval_rows={config.data / f'{stage}_held_out.json'}",
            f"data.images={config.data / 'images'}",
        ]
        base = {"language_model": str(config.base / "llama"), "vision_tower": str(config.base / "clip")}
    else:
        first = load_config(config.configs[0]).model
        base = {"language_model": str(first.language_model), "vision_tower": str(first.vision_tower)}
    if init_from is None:
        overrides += ["init_from=null", *(f"model.{key}={value}" for key, value in base.items())]
    else:
        overrides.append(f"init_from={init_from}")
    for override in config.overrides:
        name, colon, rest = override.partition(":")
        # A colon can also be part of a value ("key=a:b"), after the "=".
        if colon and "=" not in name:
            overrides += [rest] if name == stage else []
        else:
            overrides.append(override)
    return load_config(path, overrides)


def _score(config: StagesConfig, run: Path, out: Path) -> dict[str, Any]:
    task = TaskConfig(task=config.task, data=str(config.data), max_questions=config.max_questions)
    settings = EvalConfig(
        images_as=("right", "shuffled"), generation=GenerationConfig(max_new_tokens=24, batch_size=32)
    )
    return evaluate(out, task, settings, run=run)


def _row(result: dict[str, Any]) -> dict[str, Any]:
    def values(condition: str) -> dict[str, float | None]:
        found = result["conditions"][condition]["figures"]
        return {name: found[name]["value"] for name in SHOWN if name in found}

    kinds = result["conditions"]["right"]["by_group"].get("question_type", {})
    return {
        "right": values("right"),
        "shuffled": values("shuffled") if "shuffled" in result["conditions"] else {},
        "by_kind": {k: v["closed_accuracy"]["value"] for k, v in kinds.items() if "closed_accuracy" in v},
        "distinct_share": result["conditions"]["right"]["repetition"]["distinct_share"],
        "num_questions": result["num_questions"],
    }


def mean_and_range(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Mean, minimum and maximum over the seeds, or None without values."""
    known = [value for value in values if value is not None]
    return (statistics.mean(known), min(known), max(known)) if known else None


def _cell(values: Sequence[float | None]) -> str:
    found = mean_and_range(values)
    if found is None:
        return "–"
    mean, low, high = found
    return f"{mean:.1%}" if len(values) == 1 else f"{mean:.1%} ({low:.1%}–{high:.1%})"


def to_markdown(table: dict[str, Any]) -> str:
    """The table in Markdown: mean over the seeds, with minimum and maximum in parentheses."""
    seeds = next(iter(table["variants"].values()))
    figures = [name for name in SHOWN if name in seeds[0]["right"]]
    kinds = list(seeds[0]["by_kind"])
    head = ["", *(name.replace("_", " ") for name in figures), *kinds, "shuffled images", "distinct answers"]
    body = []
    for label, rows in table["variants"].items():
        cells = [
            *(_cell([row["right"].get(name) for row in rows]) for name in figures),
            *(_cell([row["by_kind"].get(kind) for row in rows]) for kind in kinds),
            _cell([row["shuffled"].get(figures[0]) for row in rows]),
            _cell([row["distinct_share"] for row in rows]),
        ]
        body.append([label, *cells])
    lines = markdown_table(head, body)
    chance = table["chance"]
    note = (
        f"\n{table['task']}, {table['num_questions']} questions, {table['num_seeds']} seed(s): mean (minimum–maximum). "
        f"Chance, the best constant answer to each type of question: {'–' if chance is None else f'{chance:.1%}'}."
    )
    if table["overrides"]:
        note += f" Settings changed: {', '.join(table['overrides'])}."
    return "\n".join([*lines, note]) + "\n"


def write_picture(path: Path, table: dict[str, Any]) -> None:
    """Bars of the first figures of each variant, right and shuffled images. Dots are seeds, the line is chance."""
    seeds = next(iter(table["variants"].values()))
    figures = [name for name in SHOWN if name in seeds[0]["right"]][:2]
    series = [(name, "right") for name in figures] + [(figures[0], "shuffled")]
    colors = (plots.BLUE, plots.GREEN, plots.GRAY) if len(series) == 3 else (plots.BLUE, plots.GRAY)
    canvas, axes = plots.new_canvas(8.0, 3.6)
    width = 0.8 / len(series)
    for index, rows in enumerate(table["variants"].values()):
        for number, (name, condition) in enumerate(series):
            values = [row[condition][name] for row in rows if row[condition].get(name) is not None]
            if not values:
                continue
            x = index + (number - (len(series) - 1) / 2) * width
            label = f"{name.replace('_', ' ')}, {condition} images" if index == 0 else None
            axes.bar(x, statistics.mean(values), width * 0.92, color=colors[number], label=label)
            axes.scatter([x] * len(values), values, s=9, color="black", zorder=3)
    chance = table["chance"]
    if chance is not None:
        axes.axhline(chance, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(table["variants"])), list(table["variants"]))
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, frameon=False, ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    plots.save(canvas, path)
