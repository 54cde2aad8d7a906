"""Figures of open-access articles with their captions: PMC-OA, and the output of PMC-15M's pipeline.

PMC-OA (Lin et al., "PMC-CLIP", 2023; hub: axiong/pmc_oa): ``{train,valid,test}.jsonl`` with ``image``, ``caption`` and
``pmcid``, one line for each figure. PMC-15M (Zhang et al., "BiomedCLIP", 2024; microsoft/BiomedCLIP_data_pipeline):
``pubmed_parsed_data.jsonl`` with one line for each article and no splits. Images have the licenses of their articles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from babydoctor.data.sets.files import PreparedSplit
from babydoctor.data.sets.splits import SplitWriter, held_out
from babydoctor.data.sources import iter_rows
from babydoctor.progress import named_progress
from babydoctor.schema import IMAGE_TOKEN, UserError

PMC_OA_FILES = {"test": "test.jsonl", "validation": "valid.jsonl", "train": "train.jsonl"}
PMC_15M_FILE = "pubmed_parsed_data.jsonl"
INSTRUCTION = f"{IMAGE_TOKEN}\nDescribe this figure of a medical article."


class CaptionedFigure(NamedTuple):
    """A figure. ``image`` is a path inside the image folder; ``bad`` says why it cannot become a row, or is empty."""

    id: str
    image: str
    caption: str
    article: str
    bad: str = ""


def prepare_pmc(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    keep_shared_articles: bool = False,
    copy: bool = False,
) -> list[PreparedSplit]:
    """Write ``out/{train,validation,test}.json``: a row for each figure with a caption whose image is there.

    Args:
        source: the folder with the JSONL files of either set.
        images: folder of the images; None: it is searched for below ``source``.
        hold_out: share of the articles that become ``test.json``, for PMC-15M, which has no splits.
        keep_shared_articles: keep training figures of articles that also appear in the published validation or test
            split.

    Raises:
        UserError: the files are not there, or a line is not as published.
    """
    if not 0 <= hold_out < 1:
        raise UserError(f"--hold-out {hold_out}: must be at least 0 and below 1")
    published = {name: source / file for name, file in PMC_OA_FILES.items() if (source / file).is_file()}
    parsed = source / PMC_15M_FILE
    if not published and not parsed.is_file():
        files = ", ".join((*PMC_OA_FILES.values(), PMC_15M_FILE))
        raise UserError(f"{source}: holds none of {files}")
    if published and hold_out:
        raise UserError("--hold-out is for PMC-15M; PMC-OA has its own splits")
    with named_progress() as update:

        def progress(path: Path, share: float) -> None:
            update(f"reading {path.name} (percent)", round(100 * share), 100)

        if published:
            first = next(iter(published.values()))
            folder = images or _find_images(source, [figure.image for figure in _first(_pmc_oa(first, progress))])
            with SplitWriter(out, folder, group="article", keep_shared=keep_shared_articles) as writer:
                for name, path in published.items():
                    for figure in _pmc_oa(path, progress):
                        _add(writer, name, figure)
        else:
            folder = images or source
            with SplitWriter(out, folder, group="article") as writer:
                for figure in _pmc_15m(parsed, folder, progress):
                    _add(writer, "test" if held_out(figure.article, hold_out, seed) else "train", figure)
    return writer.finish(copy=copy)


def _add(writer: SplitWriter, split: str, figure: CaptionedFigure) -> None:
    if figure.bad or not figure.caption:
        writer.leave_out(split, figure.bad or "no_caption", figure.id, figure.image)
        return
    turns = [{"from": "human", "value": INSTRUCTION}, {"from": "gpt", "value": figure.caption}]
    writer.add(split, {"id": figure.id, "image": figure.image, "conversations": turns}, figure.article)


def _pmc_oa(path: Path, progress: Any) -> Iterator[CaptionedFigure]:
    for where, line in iter_rows(path, lambda share: progress(path, share)):
        image, caption, article = (_text(where, line, key) for key in ("image", "caption", "pmcid"))
        yield CaptionedFigure(Path(image).stem, image, caption, article)


def _pmc_15m(path: Path, images: Path, progress: Any) -> Iterator[CaptionedFigure]:
    root = os.path.realpath(images)
    for where, line in iter_rows(path, lambda share: progress(path, share)):
        article = _text(where, line, "pmc")
        if not isinstance(line.get("figures"), list):
            raise UserError(f"{where}: figures is no list; the file is not what the pipeline of PMC-15M writes")
        for number, figure in enumerate(line["figures"]):
            place = f"{where} figures[{number}]"
            id, caption = _text(place, figure, "pair_id"), _text(place, figure, "fig_caption")
            reference = figure.get("graphic_ref") or ""
            image = os.path.relpath(reference, root) if os.path.isabs(reference) else reference  # noqa: PTH117
            outside = image.startswith("..")
            bad = "no_image" if not reference else "image_path" if outside else ""
            yield CaptionedFigure(id, reference if outside else image, caption, article, bad)


def _text(where: str, line: Any, key: str) -> str:
    value = line.get(key) if isinstance(line, dict) else None
    if not isinstance(value, (str, int)):
        detail = f"its keys are {', '.join(line)}" if isinstance(line, dict) else getattr(line, "detail", "no object")
        raise UserError(f"{where}: {key} is missing or not text ({detail})")
    return " ".join(str(value).split())


def _first(figures: Iterator[CaptionedFigure]) -> list[CaptionedFigure]:
    return [figure for figure, _ in zip(figures, range(100), strict=False)]


def _find_images(source: Path, names: list[str]) -> Path:
    """The folder with the images, at most two levels below ``source``: the archive contains folders."""
    below = [path for path in sorted(source.glob("*")) if path.is_dir()]
    folders = [source, *below, *(path for folder in below for path in sorted(folder.glob("*")) if path.is_dir())]
    for folder in folders[:1000]:
        if any((folder / name).is_file() for name in names):
            return folder
    raise UserError(f"{source}: the images are not here ({names[:1]}); unpack images.zip there, or give --images DIR")
