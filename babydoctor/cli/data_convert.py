"""``babydoctor data convert``: rows in any form -> memory-mapped Arrow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    rows: Annotated[list[str], typer.Argument(help="JSON, JSONL, parquet, Arrow, .tar shards, folder, hub id or URL.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    on_bad: Annotated[
        str, typer.Option(help="refuse: write nothing if a row is bad; quarantine: leave bad rows out, listed.")
    ] = "refuse",
    embed_images: Annotated[bool, typer.Option("--embed-images", help="Store the images with the rows.")] = False,
) -> None:
    """Check rows once and write them as memory-mapped Arrow, which training reads without loading it."""
    from babydoctor.data.convert import convert_rows
    from babydoctor.schema import UserError

    if on_bad not in ("refuse", "quarantine"):
        raise UserError(f"--on-bad {on_bad}: must be refuse or quarantine")
    if embed_images and images is None:
        raise UserError("--embed-images needs --images DIR")
    converted = convert_rows(rows, out, images=images, on_bad=on_bad, embed_images=embed_images)
    typer.echo(f"{out}: {converted.num_rows:,} rows, fingerprint {converted.fingerprint[:16]}")
    if converted.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in converted.left_out.most_common())
        typer.echo(f"  left out: {reasons}; listed in {out / 'bad.jsonl'}")
    typer.echo(f"Train with: data.rows={out}" + (f" data.images={images}" if images and not embed_images else ""))
