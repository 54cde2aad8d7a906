"""``report.html``: one file that can be mailed, with tables, plots and cases with their images."""

from __future__ import annotations

import base64
import html
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from babydoctor.eval import plots
from babydoctor.eval.ask import Prediction
from babydoctor.eval.score import HEADLINES, is_right
from babydoctor.eval.tasks import Question, Task
from babydoctor.imaging.load import load_image

NUM_CASES = 12
"""Cases on each side of the gallery."""
THUMBNAIL_EDGE = 224
MAX_BYTES = 10_000_000

_STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5b6875; --line: #d9dfe5; --wash: #f4f6f8; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1060px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; } h3 { font-size: 15px; }
.sub, figcaption, .note { color: var(--soft); } .note { font-size: 14px; }
.warn { background: #fdf3e3; border-left: 4px solid #d9822b; padding: 8px 14px; margin: 14px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; } caption { text-align: left; color: var(--soft); padding: 4px 0; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; }
tr.us td { font-weight: 600; background: var(--wash); }
.plots { display: flex; flex-wrap: wrap; gap: 12px; } img.plot { max-width: 100%; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(228px, 1fr)); gap: 14px; }
.case { border: 1px solid var(--line); border-radius: 8px; padding: 10px; font-size: 14px; overflow-wrap: anywhere; }
.case img { width: 100%; height: 200px; object-fit: contain; background: #000; border-radius: 4px; }
.case.right { border-top: 4px solid #2e7d4f; } .case.wrong { border-top: 4px solid #b83232; }
.case.caption { border-top: 4px solid #2463a8; }
dl { margin: 6px 0 0; } dt { color: var(--soft); font-size: 12px; } dd { margin: 0 0 4px; }
code { background: var(--wash); padding: 1px 4px; border-radius: 3px; overflow-wrap: anywhere; }
"""


def write_report(
    path: Path, task: Task, result: Mapping[str, Any], predictions: Mapping[str, Sequence[Prediction]]
) -> None:
    """Write the report of one evaluation (what ``metrics.json`` holds, and the answers)."""
    parts = [
        _head(task, result),
        _summary(result),
        _looks(result),
        _groups(result),
        _calibration(result),
        _repeats(result),
        _published(result),
        _gallery(task, predictions["right"]),
        _provenance(result),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(task.name)}: evaluation</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    size = len(page.encode())
    assert size < MAX_BYTES, f"the report has {size} bytes; the gallery must be smaller"
    path.write_text(page, encoding="utf-8")


def _head(task: Task, result: Mapping[str, Any]) -> str:
    run = result["run"]
    subject = run["manifest"]["name"] if run else Path(str(result["predictions"])).name
    notes = [*result["notes"], *result["leakage"]["notes"]]
    failed = sum(result["num_failed"].values())
    if failed:
        notes.append(f"{failed} questions could not be answered and count as empty answers.")
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f"<h1>{html.escape(task.name)}: {html.escape(subject)}</h1>"
        f'<p class="sub">{result["num_questions"]} questions about {result["num_images"]} images, '
        f"{html.escape(result['created'])}</p>"
        '<div class="warn">For research only. No figure here says that the model is fit to be used on a patient.'
        f"{f'<ul>{items}</ul>' if items else ''}</div>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry.get("value") is None:
        return "–"
    if entry.get("low") is None:
        return _number(entry["value"])
    return f"{_number(entry['value'])} <span class='sub'>[{_number(entry['low'])}, {_number(entry['high'])}]</span>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, mark_first: bool = False) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(
        f"<tr class='us'>{line}</tr>" if mark_first and number == 0 else f"<tr>{line}</tr>"
        for number, line in enumerate(lines)
    )
    return (
        f"<div class='scroll'><table><caption>{caption}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def headline_figures(result: Mapping[str, Any]) -> list[str]:
    """The headline figures that this task has."""
    found = result["conditions"]["right"]["figures"]
    return [name for name in HEADLINES if found.get(name, {}).get("value") is not None]


def _title(name: str) -> str:
    return html.escape(name.replace("_", " "))


def _summary(result: Mapping[str, Any]) -> str:
    right = result["conditions"]["right"]
    shown = headline_figures(result)
    rows = [["this model", *(_interval(right["figures"][name]) for name in shown)]]
    for name, values in result["baselines"].items():
        rows.append([f"{html.escape(name)}", *(_number(values.get(figure)) for figure in shown)])
    against = _table(["", *map(_title, shown)], rows, "Against answers that never look.", mark_first=True)
    all_rows = [
        [_title(name), _interval(entry), str(entry["num_questions"]), str(entry["num_images"])]
        for name, entry in right["figures"].items()
    ]
    all_figures = _table(
        ["figure", "value", "questions", "images"], all_rows, "All figures; 95% bootstrap intervals, drawn by image."
    )
    subsets = "".join(
        _table(
            ["figure", "value", "questions", "images"],
            [
                [_title(name), _interval(entry), str(entry["num_questions"]), str(entry["num_images"])]
                for name, entry in figures.items()
            ],
            f"Only {_title(subset)}.",
        )
        for subset, figures in right["subsets"].items()
    )
    return f"<h2>Summary</h2>{against}<h3>In full</h3>{all_figures}{subsets}"


def _looks(result: Mapping[str, Any]) -> str:
    if not result["gaps"]:
        return ""
    shown = headline_figures(result)
    rows = [
        [html.escape(condition), *(_interval(scored["figures"].get(name)) for name in shown)]
        for condition, scored in result["conditions"].items()
    ]
    gap_rows = []
    for condition, gaps in result["gaps"].items():
        cells = []
        for name in shown:
            p_value = gaps.get(name, {}).get("p_value")
            cells.append(_interval(gaps.get(name)) + (f" p={p_value:.4f}" if p_value is not None else ""))
        gap_rows.append([f"right image minus {html.escape(condition)}", *cells])
    image = plots.to_image_tag(plots.plot_conditions(result["conditions"], shown), "figures by image condition")
    return (
        "<h2>Does it look?</h2><p class='note'>The same questions with the right image, with another case's, with a "
        "blank one and with noise. A model that scores as well without the right image does not read it.</p>"
        f"{image}{_table(['image', *map(_title, shown)], rows, '', mark_first=True)}"
        f"{_table(['gap', *map(_title, shown)], gap_rows, 'Paired by image; p of a permutation test.')}"
    )


def _groups(result: Mapping[str, Any]) -> str:
    right = result["conditions"]["right"]
    images = []
    for group, values in right["by_group"].items():
        for figure in ("closed_accuracy", "open_token_f1", "rouge_l"):
            if any(value.get(figure, {}).get("value") is not None for value in values.values()):
                overall = right["figures"].get(figure, {}).get("value")
                title = f"{figure.replace('_', ' ')} by {group.replace('_', ' ')}"
                images.append(plots.to_image_tag(plots.plot_groups(values, figure, title, overall), title))
    if not images:
        return ""
    return (
        "<h2>Where it is right</h2><p class='note'>Lines are 95% intervals; the dashed line is all questions.</p>"
        f"<div class='plots'>{''.join(images)}</div>"
    )


def _calibration(result: Mapping[str, Any]) -> str:
    found = result["calibration"]
    if found is None:
        return ""
    return (
        "<h2>Does its confidence mean anything?</h2><p class='note'>Confidence of a yes/no answer: the model's "
        f"probability of the word it gave, over both words ({found['num_answers']} answers).</p><div class='plots'>"
        f"{plots.to_image_tag(plots.plot_calibration(found), 'calibration')}"
        f"{plots.to_image_tag(plots.plot_abstention(found), 'abstention')}</div>"
    )


def _repeats(result: Mapping[str, Any]) -> str:
    told = result["conditions"]["right"]["repetition"]
    rows = [
        [html.escape(entry["answer"][:120]) or "(empty)", str(entry["count"]), f"{entry['share']:.1%}"]
        for entry in told["most_repeated"]
    ]
    return (
        f"<h2>Does it repeat itself?</h2><p>{told['num_distinct']} distinct answers of {told['num_answers']} "
        f"({told['distinct_share']:.1%}); {told['empty_share']:.1%} are empty.</p>"
        f"{_table(['most repeated', 'times', 'share'], rows, '')}"
    )


def _published(result: Mapping[str, Any]) -> str:
    published = result["conditions"]["right"]["published"]
    if not published:
        return ""
    names = list(published)
    # One figure a row: there are more answerers than figures, but their numbers are short.
    head = ["figure", "this model", *map(html.escape, result["baselines"])]
    rows = [
        [_title(name), _interval(published[name]), *(_number(b.get(name)) for b in result["baselines"].values())]
        for name in names
    ]
    sources = "".join(f"<li>{_title(name)}: {html.escape(published[name]['source'])}</li>" for name in names)
    return (
        "<h2>As others define it</h2><p class='note'>For comparison with papers only: constant answers score high "
        f"under some of these.</p>{_table(head, rows, '')}<ul>{sources}</ul>"
    )


def _thumbnail(question: Question) -> str:
    if question.image is None:
        return ""
    image = load_image(question.image)
    image.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(question.image_key)}" src="data:image/jpeg;base64,{data}">'


def _case(question: Question, prediction: Prediction, css_class: str) -> str:
    sure = f" ({prediction.confidence:.0%} sure)" if prediction.confidence is not None else ""
    references = " / ".join(question.references[:3])
    return (
        f"<div class='case {css_class}'>{_thumbnail(question)}<dl><dt>question</dt>"
        f"<dd>{html.escape(question.prompt)}</dd><dt>reference</dt><dd>{html.escape(references)}</dd>"
        f"<dt>answer{sure}</dt><dd>{html.escape(prediction.answer) or '(empty)'}</dd></dl></div>"
    )


def _gallery(task: Task, predictions: Sequence[Prediction]) -> str:
    """A fixed random draw: what was drawn says nothing, what is shown is not picked."""
    pairs = list(zip(task.questions, predictions, strict=True))
    random.Random(0).shuffle(pairs)
    if task.is_caption:
        cases = "".join(_case(question, prediction, "caption") for question, prediction in pairs[: 2 * NUM_CASES])
        return f"<h2>Captions, drawn at random</h2><div class='cases'>{cases}</div>"
    sides = []
    for css_class, wanted, title in (("right", True, "Right answers"), ("wrong", False, "Wrong answers")):
        chosen = [pair for pair in pairs if is_right(pair[0], pair[1].answer) == wanted]
        cases = "".join(_case(question, prediction, css_class) for question, prediction in chosen[:NUM_CASES])
        sides.append(f"<h2>{title}, drawn at random ({len(chosen)})</h2><div class='cases'>{cases}</div>")
    return "".join(sides)


def _provenance(result: Mapping[str, Any]) -> str:
    run = result["run"]
    stages = run["manifest"]["lineage"] if run else []
    lineage = " → ".join(
        f"{stage['name']} ({stage['steps']} steps, {stage['samples']} samples)" if stage["steps"] else stage["name"]
        for stage in stages
    )
    rows = {
        "command": f"<code>{html.escape(result['command'])}</code>",
        "run": html.escape(run["path"]) if run else "predictions from a file",
        "lineage": html.escape(lineage) or "–",
        "data fingerprint": f"<code>{result['data_fingerprint']}</code>",
        "git commit": f"<code>{html.escape(str(result['git_commit']))}</code>",
        "versions": html.escape(", ".join(f"{name} {version}" for name, version in result["versions"].items())),
    }
    body = "".join(f"<tr><td>{name}</td><td class='text'>{value}</td></tr>" for name, value in rows.items())
    return f"<h2>Where this comes from</h2><div class='scroll'><table>{body}</table></div>"
