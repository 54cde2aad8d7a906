"""``babydoctor export``: write a run directory for other software."""

from __future__ import annotations

from pathlib import Path

import torch

from babydoctor.files import atomic_directory, explain_full_disk
from babydoctor.interop.plain import PlainRun, open_plain
from babydoctor.schema import UserError

FORMATS = ("hf", "llava", "gguf")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_USE = {
    "hf": """\
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    processor = AutoProcessor.from_pretrained("DIR")
    model = LlavaForConditionalGeneration.from_pretrained("DIR", dtype="auto")
    messages = [{"role": "user", "content": [{"type": "image", "path": "scan.png"}, {"type": "text", "text": "..."}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    print(processor.decode(model.generate(**inputs, max_new_tokens=128)[0], skip_special_tokens=True))

    transformers serve DIR
    vllm serve DIR --max-model-len 2048 --limit-mm-per-prompt '{"image": 1}'
    python -m sglang.launch_server --model-path DIR \\
        --json-model-override-args '{"vision_feature_select_strategy": "patch"}'
""",
    "llava": """\
    cd DIR && python -m llava.eval.run_llava --model-path . --image-file scan.png --query "..."
""",
    "gguf": """\
    llama-server -m DIR/model.gguf --mmproj DIR/mmproj-cls-last.gguf --jinja -c 2048 --temp 0
    llama-mtmd-cli -m DIR/model.gguf --mmproj DIR/mmproj-cls-last.gguf --jinja --temp 0 --image scan.png -p "..."
""",
}


def export_run(path: Path, out: Path, *, format: str, dtype: str | None = None) -> list[str]:
    """Write a run in another format, with a README on how to use it.

    Args:
        format: one of ``FORMATS``.
        dtype: type of the weights; None: the run's. ``gguf`` also takes llama.cpp's block formats.

    Returns:
        Lines for the user, which are also in the README.

    Raises:
        UserError: the format or dtype is unknown, or cannot represent this run. ``out`` is left as it was.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is not one of {', '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    run = open_plain(path)
    hint = "free some space there, or choose an --out on another disk"
    with explain_full_disk(f"the {format} export", out.parent, hint), atomic_directory(out) as directory:
        notes = _write(run, directory, format, dtype or run.manifest.dtype)
        (directory / "README.md").write_text(_readme(run, format, notes, out.name))
    return [f"{out}: {run.manifest.name} for {format}", *notes]


def _write(run: PlainRun, directory: Path, format: str, dtype: str) -> list[str]:
    if format == "gguf":
        from babydoctor.interop.gguf_export import export_gguf

        return export_gguf(run, directory, dtype)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if format == "hf":
        from babydoctor.interop.hf_export import export_hf

        return export_hf(run, directory, _DTYPES[dtype])
    from babydoctor.interop.llava_export import export_llava

    return export_llava(run, directory, _DTYPES[dtype])


def _readme(run: PlainRun, format: str, notes: list[str], name: str) -> str:
    manifest = run.manifest
    lines = [
        f"# {manifest.name}",
        "",
        "For academic research only: not a medical device, and never a replacement for a doctor.",
        "",
        f"Exported by BabyDoctor (`babydoctor export --format {format}`). Template `{manifest.template}`, images "
        f"{manifest.image_size} px, `{manifest.image_mode}`.",
        "",
        _USE[format].replace("DIR", name),
        *[f"- {note}" for note in notes],
    ]
    return "\n".join(lines) + "\n"
