"""Writing big checkpoints in safetensors, one tensor in memory at a time.

Source: the safetensors format (a length, a JSON header, the tensors' bytes). The header may end in spaces, so room
for it is left at the head of the file and it is filled in when the last tensor of the shard has been written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHARD_BYTES = 2 * 2**30
"""Size at which a shard is closed. Whoever reads the checkpoint maps one shard at a time."""

_HEADER_BYTES = 2**17
_MAX_TENSORS = 512
"""A shard is closed after so many tensors too, so that the header (about 150 bytes a tensor) always has room."""

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class ShardWriter:
    """A checkpoint directory in the making: ``write`` each tensor, then ``close``.

    Files are named as transformers names them (``model.safetensors``, or ``model-00001-of-00003.safetensors`` with
    an index).
    """

    def __init__(self, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.shard_bytes = shard_bytes
        self._shards: list[list[str]] = []
        self._total = 0
        self._file: IO[bytes] | None = None
        self._header: dict[str, object] = {}
        self._size = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor, on any device and in any memory layout."""
        assert all(name not in members for members in self._shards) and name not in self._header, name
        if self._file is None:
            self._file = self._shard_path(len(self._shards)).open("wb")
            self._file.write(b" " * _HEADER_BYTES)
            self._header, self._size = {"__metadata__": {"format": "pt"}}, 0
        data = tensor.detach().cpu().contiguous()
        start, self._size = self._size, self._size + data.nbytes
        self._header[name] = {
            "dtype": _DTYPES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [start, self._size],
        }
        # Bytes, because numpy knows no bfloat16.
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        if self._size >= self.shard_bytes or len(self._header) > _MAX_TENSORS:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard, give all their names and write the index where there is more than one."""
        if self._file is not None:
            self._finish_shard()
        count = len(self._shards)
        weight_map = {}
        for index, members in enumerate(self._shards):
            name = "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(index).rename(self.directory / name)
            weight_map.update(dict.fromkeys(members, name))
        if count > 1:
            index_json = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1) + "\n")

    def _finish_shard(self) -> None:
        assert self._file is not None
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= _HEADER_BYTES - 8, (len(header), len(self._header))
        self._file.seek(0)
        self._file.write((_HEADER_BYTES - 8).to_bytes(8, "little") + header)
        self._file.close()
        self._file = None
        self._shards.append([name for name in self._header if name != "__metadata__"])
        self._total += self._size

    def _shard_path(self, index: int) -> Path:
        return self.directory / f".shard-{index}"


def with_progress(
    weights: Iterable[tuple[str, torch.Tensor]], description: str, total: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass weights through and show a bar of how many there have been."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in weights:
            yield item
            progress.advance(task)
