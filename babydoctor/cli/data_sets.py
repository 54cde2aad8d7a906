"""``babydoctor data phantom``, ``lcs``, ``roco``, ``mimic-cxr`` and so on: write the rows of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from babydoctor.data.sets.files import PreparedSplit

Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Source = Annotated[Path | None, typer.Option("--source", help="Folder with the original files of the set.")]
Download = Annotated[
    bool, typer.Option("--download", help="Download the original files first, into --source or OUT/download.")
]
OriginalFiles = Annotated[Path, typer.Option("--source", help="Folder with the original files of the set.")]
Section = Annotated[str, typer.Option(help="Part of the report to answer with: findings, impression or both.")]
HoldOut = Annotated[float, typer.Option("--hold-out", help="Share to hold out as test.json, 0 to 1.")]
Copy = Annotated[bool, typer.Option("--copy/--link", help="Copy the images to OUT/images, or link them.")]


def register(data: typer.Typer) -> None:
    """Add the commands to the group ``data``."""
    data.command("phantom")(make_phantoms)
    data.command("lcs")(make_lcs)
    data.command("instruct")(make_instruct)
    data.command("roco")(make_roco)
    data.command("vqa-rad")(make_vqa_rad)
    data.command("mimic-cxr")(make_mimic_cxr)
    data.command("iu-xray")(make_iu_xray)
    data.command("pmc")(make_pmc)


def make_phantoms(
    out: Out,
    num_train: Annotated[int, typer.Option(help="Number of cases to train on.")] = 2400,
    num_held_out: Annotated[int, typer.Option(help="Number of cases to score on.")] = 480,
    seed: Annotated[int, typer.Option(help="Random seed. The same seed gives the same bytes.")] = 0,
    size: Annotated[int, typer.Option(help="Edge of the images in pixels.")] = 84,
) -> None:
    """Generate radiology phantoms: alignment, instruction and radiology sets, each for training and held out."""
    from babydoctor.phantom.write import write_phantoms

    write_phantoms(out, num_train=num_train, num_held_out=num_held_out, seed=seed, size=size)
    typer.echo(f"{num_train:,} training and {num_held_out:,} held-out cases in {out}")


def make_lcs(out: Out, source: Source = None, download: Download = False, copy: Copy = False) -> None:
    """Prepare LCS-558K for the alignment stage: 558,128 captions, 27 GB of images."""
    from babydoctor.data.sets.lcs import download_lcs, prepare_lcs

    folder = _original_files(source, out, download)
    _report([prepare_lcs(download_lcs(folder) if download else folder, out, copy=copy)], download=download)


def make_instruct(out: Out, source: Source = None, download: Download = False, copy: Copy = False) -> None:
    """Prepare LLaVA-Instruct-80K for the instruction stage: 80,000 conversations, 19 GB of COCO images."""
    from babydoctor.data.sets.instruct import download_instruct, prepare_instruct

    folder = _original_files(source, out, download)
    _report([prepare_instruct(download_instruct(folder) if download else folder, out, copy=copy)], download=download)


def make_roco(
    out: Out,
    split: Annotated[str, typer.Option(help="train, validation or test.")],
    source: Source = None,
    release: Annotated[str, typer.Option(help="v1: ROCO of 2018; v2: ROCOv2 of 2024.")] = "v1",
    download: Annotated[
        bool, typer.Option("--download", help="Read the rows of photonmz/roco-instruct-65k; images from --source.")
    ] = False,
    disjoint_from: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another split: its folder, or with --release v2 its name. Rows of its articles are left out. "
            "May be repeated."
        ),
    ] = None,
    copy: Copy = False,
) -> None:
    """Prepare roco-instruct for the radiology stage, with a row for each caption of ROCO whose JPEG exists."""
    from babydoctor.data.sets.roco import prepare_roco, prepare_roco_from_hub
    from babydoctor.data.sets.rocov2 import prepare_rocov2
    from babydoctor.schema import UserError

    if release not in ("v1", "v2"):
        raise UserError(f"--release {release}: must be v1 or v2")
    if download:
        if disjoint_from:
            raise UserError("--disjoint-from needs ROCO's licences.txt; make the rows from --source, not --download")
        if release == "v2":
            raise UserError("--release v2 needs ROCOv2's files from Zenodo in --source; there is no --download of them")
        prepared = prepare_roco_from_hub(source, split, out, copy=copy)
    else:
        folder = _original_files(source, out, download)
        if release == "v2":
            others = [str(other) for other in disjoint_from or ()]
            prepared = prepare_rocov2(folder, split, out, disjoint_from=others, copy=copy)
        else:
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
    """Prepare VQA-RAD (CC0): clinicians' questions about 314 images, with the official split or held out by image."""
    from babydoctor.data.sets.vqa_rad import download_vqa_rad, prepare_vqa_rad

    folder = _original_files(source, out, download)
    folder = download_vqa_rad(folder) if download else folder
    _report(prepare_vqa_rad(folder, out, hold_out_images=hold_out_images, seed=seed, copy=copy), download=download)


def make_mimic_cxr(
    out: Out,
    source: OriginalFiles,
    reports: Annotated[
        Path | None, typer.Option(help="Folder with the reports (mimic-cxr-reports), if not in --source.")
    ] = None,
    section: Section = "both",
    views: Annotated[str, typer.Option(help="View positions to keep, for example PA,AP,LATERAL; all: every one.")] = (
        "PA,AP"
    ),
    copy: Copy = False,
) -> None:
    """Prepare MIMIC-CXR from PhysioNet's files: chest radiographs and their reports, with the published splits."""
    from babydoctor.data.sets.mimic_cxr import prepare_mimic_cxr

    folder = _original_files(source, out, download=False)
    kept = [] if views == "all" else [view.strip() for view in views.split(",") if view.strip()]
    prepared = prepare_mimic_cxr(folder, out, reports=reports, section=section, views=kept, copy=copy)
    _report(prepared, download=False)


def make_iu_xray(
    out: Out,
    source: OriginalFiles,
    section: Section = "both",
    hold_out: HoldOut = 0.0,
    seed: Annotated[int, typer.Option(help="Decides which reports are held out.")] = 0,
    first_image: Annotated[bool, typer.Option("--first-image", help="Only the first image of each report.")] = False,
    copy: Copy = False,
) -> None:
    """Prepare IU X-ray from Open-i's XML reports and PNG files, or from R2Gen's annotation.json with its splits."""
    from babydoctor.data.sets.iu_xray import prepare_iu_xray

    folder = _original_files(source, out, download=False)
    prepared = prepare_iu_xray(
        folder, out, section=section, hold_out=hold_out, seed=seed, first_image=first_image, copy=copy
    )
    _report(prepared, download=False)


def make_pmc(
    out: Out,
    source: OriginalFiles,
    images: Annotated[Path | None, typer.Option(help="Folder of the images; default: found below --source.")] = None,
    hold_out: HoldOut = 0.0,
    seed: Annotated[int, typer.Option(help="Decides which articles are held out.")] = 0,
    keep_shared_articles: Annotated[
        bool,
        typer.Option("--keep-shared-articles", help="Keep rows of articles that an evaluation split has too."),
    ] = False,
    copy: Copy = False,
) -> None:
    """Prepare PMC-OA or PMC-15M from JSONL: figures of articles with their captions, no article in two splits."""
    from babydoctor.data.sets.pmc import prepare_pmc

    folder = _original_files(source, out, download=False)
    _report(
        prepare_pmc(
            folder,
            out,
            images=images,
            hold_out=hold_out,
            seed=seed,
            keep_shared_articles=keep_shared_articles,
            copy=copy,
        ),
        download=False,
    )


def _original_files(source: Path | None, out: Path, download: bool) -> Path:
    from babydoctor.schema import UserError

    if source is None:
        if not download:
            raise UserError("give --source DIR with the set's original files, or --download to fetch them")
        return out / "download"
    if not download and not source.is_dir():
        raise UserError(f"--source {source}: no such directory; give the folder that holds the data set's files")
    return source


def _report(prepared: Sequence[PreparedSplit], *, download: bool) -> None:
    """Print what was written and what was left out. It is an error if a download does not have the published size."""
    from babydoctor.schema import UserError

    for split in prepared:
        typer.echo(f"{split.rows}: {split.num_rows:,} rows, {split.num_images:,} images in {split.images}")
        for note in split.notes:
            typer.echo(f"  note: {note}")
        if split.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in split.left_out.most_common())
            typer.echo(f"  left out: {reasons}; listed in {split.left_out_list}")
        if split.num_expected is not None and split.num_expected != split.num_read:
            text = f"{split.num_read:,} rows were in the source, and {split.num_expected:,} are published"
            if download:
                raise UserError(f"{text}; remove the download and fetch it again")
            typer.echo(f"  note: {text}: this is not the full set")
    typer.echo("Check with: babydoctor data check " + f"{prepared[0].rows} --images {prepared[0].images}")
