"""LCS-558K, the alignment set: 558,128 images of LAION, CC and SBU with one BLIP caption each.

Liu et al., "Visual Instruction Tuning" (2023). Rows and images are on the hub at liuhaotian/LLaVA-Pretrain.
"""

from __future__ import annotations

from pathlib import Path

from babydoctor.data.sets.files import PreparedSplit, prepare_llava_rows, unpack_zip
from babydoctor.data.sets.hub import copy_sources, download_hub_file
from babydoctor.data.sources import iter_rows
from babydoctor.schema import UserError

REPO = "liuhaotian/LLaVA-Pretrain"
ROWS_FILE = "blip_laion_cc_sbu_558k.json"
IMAGES_ARCHIVE = "images.zip"
NUM_ROWS = 558_128


def download_lcs(folder: Path) -> Path:
    """Download rows (0.2 GB) and images (27 GB) into ``folder``."""
    download_hub_file(REPO, ROWS_FILE, folder)
    if not (folder / "images").is_dir():
        download_hub_file(REPO, IMAGES_ARCHIVE, folder)
    return folder


def prepare_lcs(source: Path, out: Path, *, copy: bool = False) -> PreparedSplit:
    """Write ``out/train.json`` and ``out/images`` from the files in ``source``.

    ``source`` holds ``blip_laion_cc_sbu_558k.json`` and ``images.zip`` or its content, unpacked there or under
    ``images/``. An archive is unpacked next to itself, once.
    """
    rows = source / ROWS_FILE
    if not rows.is_file():
        raise UserError(f"{source}: holds no {ROWS_FILE}; download it from https://huggingface.co/datasets/{REPO}")
    images, archive = source / "images", source / IMAGES_ARCHIVE
    if archive.is_file() and not (images / ".complete").exists():
        unpack_zip(archive, images)
        (images / ".complete").touch()
    elif not images.is_dir():
        images = source  # unpacked in place: 00000/, 00001/, ...
    copy_sources(source, out)
    return prepare_llava_rows(iter_rows(rows), images, out, name="train", copy=copy, num_expected=NUM_ROWS)
