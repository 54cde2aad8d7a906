"""``babydoctor import | export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(name="import")(import_)
    app.command()(export)


def import_(
    source: Annotated[str, typer.Argument(help="folder or hub id of a LLaVA checkpoint, in any of its four layouts")],
    out: Annotated[Path, typer.Option(help="run directory to write; must not exist")],
    vision_tower: Annotated[
        Optional[str], typer.Option(help="folder or hub id of the CLIP; default: from its config")  # noqa: UP045
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="folder or hub id of the language model below a projector or LoRA; default: from its config"),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="conversation template it was trained with; default: the usual one of its language model"),
    ] = None,
    image_mode: Annotated[
        Optional[str], typer.Option(help="square or pad; default: from its config")  # noqa: UP045
    ] = None,
) -> None:
    """Create a run directory from a checkpoint of the original LLaVA code."""
    from typing import cast

    from babydoctor.imaging.preprocess import ImageMode
    from babydoctor.interop.llava_import import import_llava
    from babydoctor.schema import UserError

    if image_mode not in (None, "square", "pad"):
        raise UserError(f"--image-mode {image_mode!r} is not square or pad")
    manifest = import_llava(
        source,
        out,
        base=base,
        vision_tower=vision_tower,
        template=template,
        image_mode=cast("ImageMode | None", image_mode),
    )
    print(
        f"{out}: {manifest.projector} projector, images {manifest.image_size} px {manifest.image_mode!r}, "
        f"{manifest.dtype}, template {manifest.template!r}.\nLLaVA checkpoints do not record the template. "
        "If this one was trained with another template, give it with --template (LLaVA 1.5: v1)."
    )


def export(
    run: Annotated[Path, typer.Argument(help="run directory")],
    format: Annotated[
        str, typer.Option(help="hf (transformers, vLLM, SGLang), llava (original code), gguf (llama.cpp)")
    ],
    out: Annotated[Path, typer.Option(help="directory to write; must not exist")],
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32, bfloat16 or float16, for gguf also q8_0, q5_0, q4_0 ...; default: the run's"),
    ] = None,
) -> None:
    """Export a run for other software. The README in the output says how to use it."""
    from babydoctor.interop.export import export_run

    for line in export_run(run, out, format=format, dtype=dtype):
        print(line)
