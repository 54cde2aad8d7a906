"""``babydoctor merge``: a run's LoRA folded into plain weights.

A LoRA that was trained on a 4-bit base is folded into the dequantised base, the weights it was trained on, and not
into the float base it was quantised from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.language_model import merged_weights
from babydoctor.model.run_dir import Run, atomic_directory, load_run, resolve, write_manifest
from babydoctor.model.weights import local_directory
from babydoctor.schema import UserError

SHARD_BYTES = 4 * 2**30

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of logits, relative to the largest logit, that passes for rounding."""


@dataclass(frozen=True)
class MergeReport:
    """What was compared: the largest difference of logits and the largest logit of the unmerged run."""

    difference: float
    scale: float


def merge_run(path: Path, out: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> MergeReport:
    """Write a run directory with plain weights that needs no base, no adapter and no bitsandbytes.

    Args:
        dtype: of the written weights; None: the run's.

    Raises:
        UserError: ``out`` exists, or the merged model's logits are not the run's. Nothing is left at ``out`` then.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    run = load_run(path, device=device)
    dtype = dtype or run.manifest.torch_dtype
    before = probe_logits(run.model)
    with atomic_directory(out) as directory:
        write_language_model(merged_weights(run.model.language_model), run, directory / "language_model", dtype)
        copy_model_files(Path(local_directory(resolve(path, run.manifest.vision_tower))), directory / "vision_tower")
        shutil.copy2(path / "projector.safetensors", directory)
        changes = {
            "language_model": "./language_model",
            "vision_tower": "./vision_tower",
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": "none",
            "base_adapters": (),
        }
        write_manifest(directory, run.manifest.model_copy(update=changes))
        del run
        after = probe_logits(load_run(directory, device=device).model)
        report = MergeReport(float((after - before).abs().max()), float(before.abs().max()))
        if report.difference > TOLERANCE[dtype] * report.scale:
            raise UserError(
                f"the merged weights do not answer as {path} does: logits differ by {report.difference:.3g} of "
                f"{report.scale:.3g}. Merge with --dtype float32, which rounds least."
            )
    return report


@torch.no_grad()
def probe_logits(model: BabyDoctor, num_tokens: int = 48) -> torch.Tensor:
    """Logits ``[T, V]`` (float32) at a fixed pseudo-random prompt with an image, to compare two models by."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.language_model.config.vocab_size
    length = model.num_patches + num_tokens
    input_ids = torch.randint(3, vocabulary, (1, length), generator=generator)
    image_mask = torch.zeros(1, length, dtype=torch.bool)
    image_mask[:, 1 : 1 + model.num_patches] = True
    size: Any = model.vision.config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    device = model.device
    embeds = model.embed(input_ids.to(device), image_mask.to(device), model.encode_images(pixels.to(device)))
    hidden = model.decode(embeds, torch.arange(length, device=device)[None], (length,))
    return model.language_model.lm_head(hidden)[0].float().cpu()


def write_language_model(
    weights: Iterable[tuple[str, torch.Tensor]], run: Run, directory: Path, dtype: torch.dtype
) -> None:
    """Write weights in transformers' format, shard by shard, with configuration and tokenizer."""
    directory.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, directory / f"shard-{len(names)}.safetensors", metadata={"format": "pt"})
        names.append(list(shard))
        shard, size = {}, 0

    for name, weight in weights:
        shard[name] = weight.to(dtype).contiguous().cpu()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    files = [f"model-{index + 1:05d}-of-{len(names):05d}.safetensors" for index in range(len(names))]
    for index, file in enumerate(files):
        (directory / f"shard-{index}.safetensors").rename(directory / file)
    weight_map = {name: file for file, members in zip(files, names, strict=True) for name in members}
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1))
    config = run.model.language_model.config.to_dict()
    config.update(dtype=str(dtype).removeprefix("torch."), architectures=["LlamaForCausalLM"])
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    run.tokenizer.save_pretrained(str(directory))


def copy_model_files(source: Path, target: Path) -> None:
    """Copy a model's own files (weights, configuration, processor), following links."""
    target.mkdir(parents=True)
    for pattern in ("*.safetensors", "*.bin", "*.json"):
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)
