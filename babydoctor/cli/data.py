"""``babydoctor data``: create, check and preview data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from babydoctor.cli import data_sets
from babydoctor.cli.data_convert import convert

if TYPE_CHECKING:
    from babydoctor.conversation import Template
    from babydoctor.schema import Sample

Template_ = Annotated[
    str, typer.Option("--template", help="Conversation template; which base takes which: babydoctor/train/README.md.")
]
NumPatches = Annotated[int, typer.Option("--num-patches", help="Tokens that an image takes.")]


def register(app: typer.Typer) -> None:
    """Add the group ``data``."""
    data = typer.Typer(help="Create, check and preview data sets.", no_args_is_help=True)
    data_sets.register(data)
    data.command("convert")(convert)
    data.command("check")(check)
    data.command("preview")(preview)
    app.add_typer(data, name="data")


def check(
    rows: Annotated[
        list[str], typer.Argument(help="LLaVA JSON, JSONL, a datasets directory or hub id; may be repeated.")
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    bad: Annotated[Path, typer.Option(help="File to list bad rows in, with the reasons.")] = Path("bad.jsonl"),
    tokenizer: Annotated[str | None, typer.Option(help="Also find rows that are too long with this tokenizer.")] = None,
    template: Template_ = "llava_llama_2",
    max_length: Annotated[int, typer.Option(help="Longest row in tokens, including the image.")] = 2048,
    num_patches: NumPatches = 256,
    burned_in_text: Annotated[
        bool, typer.Option("--burned-in-text", help="Also look for names, dates and numbers in the pixels.")
    ] = False,
    processes: Annotated[int | None, typer.Option(help="Worker processes; default: one per core.", min=1)] = None,
) -> None:
    """Read every row, decode every image and list what is bad. Exit status 1 if anything is bad."""
    from babydoctor.data.check.check import CheckSettings, check_sources
    from babydoctor.data.images import ImageFolder
    from babydoctor.data.problems import summarize, write_problems

    settings = CheckSettings(images, tokenizer, template, max_length, num_patches)
    report = check_sources(rows, settings, num_processes=processes, keep_samples=burned_in_text)
    problems = report.problems
    if burned_in_text:
        from babydoctor.data.check.burned_in_text import find_burned_in_text

        problems += find_burned_in_text(report.samples_with_image, ImageFolder(images))
    write_problems(problems, bad)
    if problems:
        typer.echo(summarize(problems, report.num_rows))
        typer.echo(f"All of them: {bad}")
    if report.num_repeated_ids:
        typer.echo(f"note: {report.num_repeated_ids:,} rows have the id of an earlier row, but other content")
    num_good = report.num_rows - len({problem.source for problem in problems})
    typer.echo(f"{num_good:,} of {report.num_rows:,} rows are good; {report.num_images:,} images were decoded")
    if problems or not report.num_rows:
        raise typer.Exit(1)


def preview(
    rows: Annotated[str, typer.Argument(help="LLaVA JSON, JSONL, a datasets directory or hub id.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of the tokenizer.")],
    template: Template_ = "llava_llama_2",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per row: prompt, input_ids (-200 for the image), labels.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(help="Number of rows to show; default: 5, or all with --json.", min=1)
    ] = None,
    num_patches: NumPatches = 256,
) -> None:
    """Show prompts as the model sees them, with the supervised tokens colored. Exit status 1 if a row is bad."""
    import itertools

    from babydoctor.data.check.check import load_template
    from babydoctor.data.rows import parse_row
    from babydoctor.data.sources import iter_rows
    from babydoctor.schema import UserError

    chosen, loaded = load_template(template, tokenizer)
    limit = limit or (None if as_json else 5)
    any_bad = False
    for source, row in itertools.islice(iter_rows(rows), limit):
        try:
            sample = parse_row(row, source)
            if as_json:
                typer.echo(_as_json(sample, chosen, loaded))
            else:
                _print_colored(sample, chosen, loaded, num_patches)
        except UserError as error:
            typer.echo(f"bad row: {error}", err=True)
            any_bad = True
    if any_bad:
        raise typer.Exit(1)


def _as_json(sample: Sample, template: Template, tokenizer: Any) -> str:
    """The JSON form of a row as in the original LLaVA code: an image is one id, -200, and is not supervised."""
    import json

    from babydoctor.conversation import prompt_text, render
    from babydoctor.data.check.check import encode_sample
    from babydoctor.schema import IMAGE_TOKEN_INDEX

    example = encode_sample(sample, template, tokenizer, num_patches=1)
    input_ids = example.input_ids.copy()
    input_ids[example.image_mask] = IMAGE_TOKEN_INDEX
    prompt = prompt_text(render(sample.turns, template, system=sample.system))
    fields = {"prompt": prompt, "input_ids": input_ids.tolist(), "labels": example.labels.tolist()}
    return json.dumps(fields, ensure_ascii=False)


def _print_colored(sample: Sample, template: Template, tokenizer: Any, num_patches: int) -> None:
    """Print the decoded ids rather than the original text, because that is what the model sees."""
    import itertools

    from rich.console import Console
    from rich.text import Text

    from babydoctor.data.check.check import encode_sample
    from babydoctor.schema import IGNORE_INDEX, IMAGE_TOKEN

    example = encode_sample(sample, template, tokenizer, num_patches)
    text = Text()
    kinds = [
        "image" if image else label != IGNORE_INDEX
        for image, label in zip(example.image_mask, example.labels, strict=True)
    ]
    position, so_far = 0, ""
    shown: list[int] = []
    for kind, run in itertools.groupby(kinds):
        length = len(list(run))
        if kind == "image":
            text.append(f"{IMAGE_TOKEN}*{length}", style="magenta")
            shown, so_far = [], ""
        else:
            # Decoded together with the tokens before, because SentencePiece drops a leading space.
            shown += example.input_ids[position : position + length].tolist()
            decoded = tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text.append(decoded[len(so_far) :], style="bold green" if kind else "")
            so_far = decoded
        position += length
    console = Console(file=sys.stdout, highlight=False)
    numbers = (
        f"{len(example)} tokens, {int(example.image_mask.sum())} of the image, {example.num_supervised} supervised"
    )
    console.print(f"{sample.source}  id {sample.id}  {numbers}", style="dim", soft_wrap=True, markup=False)
    console.print(text, end="\n\n", soft_wrap=True)
