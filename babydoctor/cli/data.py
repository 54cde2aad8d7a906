"""``babydoctor data``: make data sets, check them, look at them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from babydoctor.cli.data_convert import convert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from babydoctor.conversation import Template
    from babydoctor.data.problems import Problem
    from babydoctor.data.rows import ImageFolder
    from babydoctor.data.sets.files import PreparedSplit
    from babydoctor.schema import Example, Sample

Out = Annotated[Path, typer.Option("--out", help="Folder to write into.")]
Source = Annotated[Path | None, typer.Option("--source", help="Folder with the set's original files.")]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch the original files first, into --source or OUT/download.")
]
Copy = Annotated[bool, typer.Option("--copy/--link", help="Copy the images into OUT/images, or link them.")]
Template_ = Annotated[str, typer.Option("--template", help="plain, llava_llama_2, v1 or llama_2.")]
NumPatches = Annotated[int, typer.Option("--num-patches", help="Positions that an image takes.")]


def register(app: typer.Typer) -> None:
    """Add the group ``data``."""
    data = typer.Typer(help="Make data sets, check them, look at them.", no_args_is_help=True)
    data.command("phantom")(make_phantoms)
    data.command("lcs")(make_lcs)
    data.command("instruct")(make_instruct)
    data.command("roco")(make_roco)
    data.command("vqa-rad")(make_vqa_rad)
    data.command("convert")(convert)
    data.command("check")(check)
    data.command("preview")(preview)
    app.add_typer(data, name="data")


def make_phantoms(
    out: Out,
    num_train: Annotated[int, typer.Option(help="Cases to train on.")] = 2400,
    num_held_out: Annotated[int, typer.Option(help="Cases to score on.")] = 480,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int, typer.Option(help="Edge of the images in pixels.")] = 84,
) -> None:
    """Generate radiology phantoms: an alignment, an instruction and a radiology set, train and held-out."""
    from babydoctor.phantom.write import write_phantoms

    write_phantoms(out, num_train=num_train, num_held_out=num_held_out, seed=seed, size=size)
    typer.echo(f"{num_train:,} training and {num_held_out:,} held-out cases in {out}")


def make_lcs(out: Out, source: Source = None, download: Download = False, copy: Copy = False) -> None:
    """LCS-558K for the alignment stage: 558,128 captions, 27 GB of images."""
    from babydoctor.data.sets.lcs import download_lcs, prepare_lcs

    folder = _original_files(source, out, download)
    _report([prepare_lcs(download_lcs(folder) if download else folder, out, copy=copy)], download=download)


def make_instruct(out: Out, source: Source = None, download: Download = False, copy: Copy = False) -> None:
    """LLaVA-Instruct-80K for the instruction stage: 80,000 conversations, 19 GB of COCO images."""
    from babydoctor.data.sets.instruct import download_instruct, prepare_instruct

    folder = _original_files(source, out, download)
    _report([prepare_instruct(download_instruct(folder) if download else folder, out, copy=copy)], download=download)


def make_roco(
    out: Out,
    split: Annotated[str, typer.Option(help="train, validation or test.")],
    source: Source = None,
    download: Annotated[
        bool, typer.Option("--download", help="Read the rows of photonmz/roco-instruct-65k; images from --source.")
    ] = False,
    disjoint_from: Annotated[
        list[Path] | None, typer.Option(help="Another split's folder: leave out rows of its articles. Repeatable.")
    ] = None,
    copy: Copy = False,
) -> None:
    """roco-instruct for the radiology stage, from ROCO's captions.txt: a row for each caption whose JPEG is there."""
    from babydoctor.data.sets.roco import prepare_roco, prepare_roco_from_hub
    from babydoctor.schema import UserError

    if download:
        if disjoint_from:
            raise UserError("--disjoint-from needs ROCO's licences.txt; make the rows from --source, not --download")
        prepared = prepare_roco_from_hub(source, split, out, copy=copy)
    else:
        folder = _original_files(source, out, download)
        prepared = prepare_roco(folder, split, out, disjoint_from=disjoint_from or (), copy=copy)
    _report([prepared], download=download)


def make_vqa_rad(
    out: Out,
    source: Source = None,
    download: Download = False,
    hold_out_images: Annotated[float, typer.Option(help="Share of training images to hold out, 0 to 1.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides which images are held out.")] = 0,
    copy: Copy = False,
) -> None:
    """VQA-RAD: clinicians' questions about 314 images (CC0); the official split, or held out by image."""
    from babydoctor.data.sets.vqa_rad import download_vqa_rad, prepare_vqa_rad

    folder = _original_files(source, out, download)
    folder = download_vqa_rad(folder) if download else folder
    _report(prepare_vqa_rad(folder, out, hold_out_images=hold_out_images, seed=seed, copy=copy), download=download)


def _original_files(source: Path | None, out: Path, download: bool) -> Path:
    from babydoctor.schema import UserError

    if source is None:
        if not download:
            raise UserError("give --source DIR with the set's original files, or --download to fetch them")
        return out / "download"
    if not download and not source.is_dir():
        raise UserError(f"--source {source}: no such directory")
    return source


def _report(prepared: Sequence[PreparedSplit], *, download: bool) -> None:
    """Say what was written and what was left out. A download of another size than published is an error."""
    from babydoctor.schema import UserError

    for split in prepared:
        typer.echo(f"{split.rows}: {split.num_rows:,} rows, {split.num_images:,} images in {split.images}")
        for note in split.notes:
            typer.echo(f"  note: {note}")
        if split.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in split.left_out.most_common())
            typer.echo(f"  left out: {reasons}; listed in {split.left_out_list}")
        if split.num_expected is not None and split.num_expected != split.num_read:
            text = f"{split.num_read:,} rows were in the source where {split.num_expected:,} are published"
            if download:
                raise UserError(f"{text}; remove the download and fetch it again")
            typer.echo(f"  note: {text}: this is not the full set")
    typer.echo("Check with: babydoctor data check " + f"{prepared[0].rows} --images {prepared[0].images}")


def check(
    rows: Annotated[list[str], typer.Argument(help="LLaVA JSON, JSONL, a datasets directory or hub id; several.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    bad: Annotated[Path, typer.Option(help="Where bad rows are listed, with the reason.")] = Path("bad.jsonl"),
    tokenizer: Annotated[str | None, typer.Option(help="Also look for over-long rows with this tokenizer.")] = None,
    template: Template_ = "llava_llama_2",
    max_length: Annotated[int, typer.Option(help="Longest row in positions, image included.")] = 2048,
    num_patches: NumPatches = 256,
) -> None:
    """Read every row and decode every image. Lists what is bad; exit status 1 if anything is."""
    from babydoctor.data.problems import summarize, write_problems
    from babydoctor.data.rows import ImageFolder, check_rows, load_rows
    from babydoctor.progress import show_progress
    from babydoctor.schema import Sample

    results = list(show_progress(check_rows(load_rows(rows), images), "reading rows"))
    samples = [result for result in results if isinstance(result, Sample)]
    problems = [result for result in results if not isinstance(result, Sample)]
    if tokenizer is not None:
        problems += _find_long_rows(samples, tokenizer, template, max_length, num_patches)
    problems += _find_bad_images(samples, ImageFolder(images))
    write_problems(problems, bad)
    num_bad = len({problem.source for problem in problems})
    num_images = len({sample.image for sample in samples if sample.image is not None})
    repeated = len(samples) - len({sample.id for sample in samples})
    if problems:
        typer.echo(summarize(problems, len(results)))
        typer.echo(f"All of them: {bad}")
    if repeated:
        typer.echo(f"note: {repeated:,} rows have the id of an earlier row, but other content")
    typer.echo(f"{len(results) - num_bad:,} of {len(results):,} rows are good; {num_images:,} images were decoded")
    if problems or not results:
        raise typer.Exit(1)


def _find_bad_images(samples: Sequence[Sample], folder: ImageFolder) -> list[Problem]:
    """Decode each image once; several threads keep the decoding processes busy."""
    from concurrent.futures import ThreadPoolExecutor

    from babydoctor.data.problems import Problem
    from babydoctor.data.rows import read_image
    from babydoctor.progress import show_progress
    from babydoctor.schema import UserError

    def find_bad(references: list[str | bytes]) -> dict[str | bytes, str]:
        bad = {}
        for reference in references:
            try:
                read_image(reference, folder)
            except UserError as error:
                bad[reference] = str(error)
        return bad

    references = list(dict.fromkeys(sample.image for sample in samples if sample.image is not None))
    # In groups: half a million tasks of one image each would take more memory than the rows.
    groups = [references[start : start + 32] for start in range(0, len(references), 32)]
    bad: dict[str | bytes, str] = {}
    with ThreadPoolExecutor() as pool:
        for found in show_progress(pool.map(find_bad, groups), "decoding images (by 32)", total=len(groups)):
            bad |= found
    return [
        Problem(sample.source, sample.id, "image_undecodable", bad[sample.image])
        for sample in samples
        if sample.image is not None and sample.image in bad
    ]


def _find_long_rows(
    samples: Sequence[Sample], tokenizer: str, template: str, max_length: int, num_patches: int
) -> list[Problem]:
    from babydoctor.conversation import get_template
    from babydoctor.data.problems import Problem
    from babydoctor.data.tokens import load_tokenizer
    from babydoctor.progress import show_progress
    from babydoctor.schema import UserError

    loaded, chosen = load_tokenizer(tokenizer), get_template(template)
    problems = []
    for sample in show_progress(samples, "counting tokens"):
        try:
            length = len(_encode(sample, chosen, loaded, num_patches))
        except UserError as error:
            problems.append(Problem(sample.source, sample.id, "template", str(error)))
            continue
        if length > max_length:
            problems.append(Problem(sample.source, sample.id, "too_long", f"{length:,} of at most {max_length:,}"))
    return problems


def _encode(sample: Sample, template: Template, tokenizer: Any, num_patches: int) -> Example:
    from babydoctor.conversation import render
    from babydoctor.data.tokens import encode

    images = () if sample.image is None else (sample.image,)
    return encode(
        render(sample.turns, template, system=sample.system), tokenizer, num_patches, id=sample.id, images=images
    )


def preview(
    rows: Annotated[str, typer.Argument(help="LLaVA JSON, JSONL, a datasets directory or hub id.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of the tokenizer.")],
    template: Template_ = "llava_llama_2",
    as_json: Annotated[
        bool, typer.Option("--json", help="One object a row: prompt, input_ids (image: one -200), labels.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Show so many rows; default 5, with --json all.", min=1)] = None,
    num_patches: NumPatches = 256,
) -> None:
    """Show prompts as the model gets them, with the supervised tokens coloured. Exit status 1 if a row is bad."""
    import itertools

    from babydoctor.conversation import get_template
    from babydoctor.data.rows import iter_rows, parse_row
    from babydoctor.data.tokens import load_tokenizer
    from babydoctor.schema import UserError

    chosen, loaded = get_template(template), load_tokenizer(tokenizer)
    limit = limit or (None if as_json else 5)
    any_bad = False
    for source, row in itertools.islice(iter_rows(rows), limit):
        try:
            sample = parse_row(row, source)
            if as_json:
                typer.echo(_as_json(sample, chosen, loaded))
            else:
                _print_coloured(sample, chosen, loaded, num_patches)
        except UserError as error:
            typer.echo(f"bad row: {error}", err=True)
            any_bad = True
    if any_bad:
        raise typer.Exit(1)


def _as_json(sample: Sample, template: Template, tokenizer: Any) -> str:
    """The machine form of the original LLaVA code: an image is one id, -200, and is not supervised."""
    import json

    from babydoctor.conversation import prompt_text, render
    from babydoctor.schema import IMAGE_TOKEN_INDEX

    example = _encode(sample, template, tokenizer, num_patches=1)
    input_ids = example.input_ids.copy()
    input_ids[example.image_mask] = IMAGE_TOKEN_INDEX
    prompt = prompt_text(render(sample.turns, template, system=sample.system))
    fields = {"prompt": prompt, "input_ids": input_ids.tolist(), "labels": example.labels.tolist()}
    return json.dumps(fields, ensure_ascii=False)


def _print_coloured(sample: Sample, template: Template, tokenizer: Any, num_patches: int) -> None:
    """Print what the ids decode to, not the text they came from: that is what the model sees."""
    import itertools

    from rich.console import Console
    from rich.text import Text

    from babydoctor.schema import IGNORE_INDEX, IMAGE_TOKEN

    example = _encode(sample, template, tokenizer, num_patches)
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
            # Decoded together with what stands before it: alone, SentencePiece drops the leading space.
            shown += example.input_ids[position : position + length].tolist()
            decoded = tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text.append(decoded[len(so_far) :], style="bold green" if kind else "")
            so_far = decoded
        position += length
    console = Console(file=sys.stdout, highlight=False)
    numbers = (
        f"{len(example)} positions, {int(example.image_mask.sum())} of the image, {example.num_supervised} supervised"
    )
    console.print(f"{sample.source}  id {sample.id}  {numbers}", style="dim", soft_wrap=True, markup=False)
    console.print(text, end="\n\n", soft_wrap=True)
