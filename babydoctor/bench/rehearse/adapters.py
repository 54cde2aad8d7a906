"""Copy a run and give it LoRAs that change its answers.

After a few steps the effect of a LoRA is smaller than rounding, so a merge that ignored it would pass. The copy has
random ``B`` matrices that change each weight by a fifth of the weights' standard deviation.

Run as a program: ``python -m babydoctor.bench.rehearse.adapters RUN OUT``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from babydoctor.model.tensor_files import save_tensors

SHARE = 0.2
"""Standard deviation of a LoRA's update relative to that of the weights."""


def strengthen(run: Path, out: Path) -> None:
    """Copy a finished run without its checkpoints and give each of its LoRAs random ``B`` matrices."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "*.jsonl", "*.png"))
    base = Path(json.loads((run / "manifest.json").read_text(encoding="utf-8"))["language_model"])
    hidden = json.loads((base / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    adapters = [out / "adapter", *sorted((out / "base_adapters").glob("*"))]
    for seed, adapter in enumerate(path for path in adapters if path.is_dir()):
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
        weights = load_file(adapter / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        spread = max(0.02, 0.7 / hidden**0.5)
        for name, weight in weights.items():
            if ".lora_B." in name:
                low = weights[name.replace(".lora_B.", ".lora_A.")]
                std = SHARE * spread / (scale * config["r"] ** 0.5 * float(low.std()))
                weights[name] = torch.randn(weight.shape, generator=generator).mul_(std).to(weight.dtype)
        save_tensors(weights, adapter / "adapter_model.safetensors")


if __name__ == "__main__":
    strengthen(Path(sys.argv[1]), Path(sys.argv[2]))
