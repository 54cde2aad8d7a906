"""LLaVA-Instruct-80K, the instruction set: 80,000 conversations that GPT-4 wrote about COCO images.

Liu et al., "Visual Instruction Tuning" (2023). The rows are on the hub at
liuhaotian/LLaVA-Instruct-150K; the images are COCO's train2017.
"""

from __future__ import annotations

from pathlib import Path

from babydoctor.data.sets.files import PreparedSplit, prepare_llava_rows, unpack_zip
from babydoctor.data.sets.hub import copy_sources, download_hub_file, download_url
from babydoctor.data.sources import iter_rows
from babydoctor.schema import UserError

REPO = "liuhaotian/LLaVA-Instruct-150K"
ROWS_FILE = "llava_instruct_80k.json"
IMAGES_ARCHIVE = "train2017.zip"
IMAGES_URL = "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip"
"""COCO's own bucket, under a host name that its certificate covers (it does not cover images.cocodataset.org)."""

IMAGES_SHA1 = "10ad623668ab00c62c096f0ed636d6aff41faca5"
"""The checksum that GluonCV and others use; COCO publishes none."""
NUM_ROWS = 80_000


def download_instruct(folder: Path) -> Path:
    """Download rows and COCO's train2017 (19 GB) into ``folder``."""
    download_hub_file(REPO, ROWS_FILE, folder)
    if not (folder / "train2017").is_dir():
        download_url(IMAGES_URL, folder / IMAGES_ARCHIVE, sha1=IMAGES_SHA1)
    return folder


def prepare_instruct(source: Path, out: Path, *, copy: bool = False) -> PreparedSplit:
    """Write ``out/train.json`` and ``out/images`` from the files in ``source``.

    ``source`` holds ``llava_instruct_80k.json`` and COCO's ``train2017.zip`` or the folder ``train2017`` (also under
    ``coco/``). An archive is unpacked next to itself, once.
    """
    rows = source / ROWS_FILE
    if not rows.is_file():
        raise UserError(f"{source}: holds no {ROWS_FILE}; download it from https://huggingface.co/datasets/{REPO}")
    archive, marker = source / IMAGES_ARCHIVE, source / ".train2017-complete"
    if archive.is_file() and not marker.exists():
        unpack_zip(archive, source)  # the archive contains the folder train2017
        marker.touch()
    folders = [folder for folder in (source / "train2017", source / "coco" / "train2017") if folder.is_dir()]
    if not folders:
        raise UserError(f"{source}: holds neither {IMAGES_ARCHIVE} nor train2017/; download COCO from {IMAGES_URL}")
    copy_sources(source, out)
    return prepare_llava_rows(iter_rows(rows), folders[0], out, name="train", copy=copy, num_expected=NUM_ROWS)
