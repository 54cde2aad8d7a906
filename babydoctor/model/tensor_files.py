"""Open, read and write a single safetensors file.

Source: the safetensors format (header length, JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from babydoctor.files import check_readable
from babydoctor.schema import UserError

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float64: "F64",
}


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for reading tensor by tensor.

    Raises:
        UserError: it is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    check_readable(path)  # safetensors reports an unreadable file as missing
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {error}. It was probably not copied or "
            "downloaded completely; get it again"
        ) from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a whole safetensors file.

    Raises:
        UserError: it cannot be opened, or is truncated or damaged.
    """
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file. The library's ``save_file`` writes files that only their owner may read.

    The file is written under a temporary name and renamed: ``tensors`` may be memory-mapped from ``path`` itself.
    """
    # Wide types first, so that each tensor is aligned to the size of its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                # As bytes, because NumPy has no bfloat16.
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
