"""Compare the weights of a GGUF export with those of an HF export of the same run.

Run as a program: ``python -m babydoctor.bench.rehearse.gguf_weights GGUF HF DTYPE``; exit status 1 if they differ.
``tests/test_interop_gguf.py`` runs llama.cpp itself.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from babydoctor.model.weights import WeightReader

NAMES = {
    "token_embd.weight": "language_model.model.embed_tokens.weight",
    "output.weight": "language_model.lm_head.weight",
    "output_norm.weight": "language_model.model.norm.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
"""GGUF's names and transformers'. Query and key weights are not compared, because their rows are in another order."""

LARGEST_ERROR = {"float32": 0.005, "bfloat16": 0.01, "float16": 0.01, "q8_0": 0.02, "q5_0": 0.08, "q4_0": 0.15}
"""Largest root mean square of the difference, relative to that of the weights, for each format."""


def compare(gguf_folder: Path, hf_folder: Path, dtype: str) -> tuple[int, float, list[str]]:
    """Return the number of compared tensors, the largest relative error, and what is wrong."""
    import gguf

    reader: Any = gguf.GGUFReader(gguf_folder / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    faults: list[str] = []
    count, largest, num_language = 0, 0.0, 0
    for name, weight in WeightReader(hf_folder):
        if not name.startswith("language_model."):
            continue
        num_language += 1
        theirs = _gguf_name(name)
        if theirs is None:
            continue
        if theirs not in tensors:
            faults.append(f"model.gguf lacks {theirs}")
            continue
        tensor = tensors[theirs]
        ours = weight.float().numpy()
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, ours.shape[-1])
        rows = min(len(values), len(ours)) if ours.ndim == 2 else 1
        ours = ours.reshape(-1, ours.shape[-1])[:rows]
        error = float(np.sqrt(np.mean((values[:rows] - ours) ** 2) / np.mean(ours**2)))
        count, largest = count + 1, max(largest, error)
        if error > LARGEST_ERROR[dtype]:
            faults.append(f"{theirs} differs by {error:.1%}")
    if num_language != len(tensors):
        faults.append(f"model.gguf has {len(tensors)} tensors, the HF export {num_language} of the language model")
    for name in ("mmproj.gguf", "mmproj-cls-last.gguf"):
        if not (gguf_folder / name).is_file():
            faults.append(f"{name} is missing")
    return count, largest, faults


def _gguf_name(name: str) -> str | None:
    """``language_model.model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``; None: not compared."""
    for theirs, ours in NAMES.items():
        if name == ours:
            return theirs
        match = re.fullmatch(r"language_model\.model\.layers\.(\d+)\." + re.escape(ours), name)
        if match is not None:
            return f"blk.{match[1]}.{theirs}"
    return None


if __name__ == "__main__":
    number, error, wrong = compare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    print("\n".join([f"{number} tensors within {error:.2%}", *wrong]))
    sys.exit(1 if wrong else 0)
