"""Read and write the weights of a model directory, with one weight in memory at a time.

Source: the safetensors format (header length, JSON header, the tensors' bytes).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from babydoctor.files import check_readable
from babydoctor.hub import describe, model_directory
from babydoctor.model.tensor_files import DTYPES, open_safetensors
from babydoctor.progress import ByteProgress
from babydoctor.schema import UserError


def local_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The directory itself, or the local copy of a model on the hub; see ``hub.model_directory``."""
    return model_directory(path, weights=weights)


def read_end_tokens(path: str | Path) -> int | list[int] | None:
    """The end tokens in a model's ``generation_config.json``, which may name more than its ``config.json``; or None."""
    file = local_directory(path, weights=False) / "generation_config.json"
    if not file.is_file():
        return None
    check_readable(file)
    ends: int | list[int] | None = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return ends


def read_model_config(path: str | Path, what: str) -> Any:
    """Read the transformers configuration of a model from a directory or the hub.

    Args:
        what: the kind of model, for messages.

    Raises:
        UserError: it is not there, or its ``config.json`` cannot be read.
    """
    from transformers import AutoConfig

    directory = local_directory(path, weights=False)
    try:
        return AutoConfig.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no {what} could be read from {str(path)!r} ({describe(error)}); give a directory with config.json, or "
            "the id of a model on the hub"
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint: safetensors if there are any, else ``pytorch_model*.bin``."""
    for pattern, index_name in (
        ("model*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        index = directory / index_name
        if index.is_file():
            names = sorted(set(read_index(index).values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise UserError(f"{index} names {', '.join(missing)}, which is not in {directory}; copy it there")
            return [directory / name for name in names]
        if files := sorted(directory.glob(pattern)):
            return files
    raise UserError(f"{directory} holds no model*.safetensors and no pytorch_model*.bin; copy the complete model")


SHARD_BYTES = 2 * 2**30
"""Size at which a written shard is closed. Readers map one shard at a time."""

_MAPPED_BYTES = 2**29
_COPIED_BYTES = 2**20
"""Weights up to this size are copied. A norm's 8 KB that a model keeps would keep ``_MAPPED_BYTES`` mapped."""

_HEADER_BYTES = 2**17
_MAX_TENSORS = 512
"""A shard is also closed after this many tensors, so that its header (about 150 bytes per tensor) fits."""


class WeightReader:
    """Reads the weights of a checkpoint by name. One file is open at a time.

    Large weights are memory-mapped. Those that the caller no longer holds are unmapped when the next file is opened,
    and after every ``_MAPPED_BYTES`` of a large file. So reading a whole checkpoint takes little memory at any shard
    size.

    Attributes:
        files: the file of each weight by name, in file order.

    Raises:
        UserError: there are no weights, a file is damaged, or an index names a weight that its file lacks.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}
        self._path: Path | None = None
        self._open: Any = None
        self._mapped = 0
        paths = weight_files(directory)
        for path in paths:
            for name in self._file(path).keys():  # noqa: SIM118 - safetensors' file is not a dict
                self.files[name] = path
        self._check_index(paths[0].suffix)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight with its name, file by file."""
        for name in self.files:
            yield name, self.read(name)

    def show_progress(self, description: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate, and show the progress in bytes."""
        with ByteProgress(description, sum(path.stat().st_size for path in set(self.files.values()))) as progress:
            for name, weight in self:
                yield name, weight
                progress.advance(weight.nbytes)

    def read(self, name: str) -> torch.Tensor:
        """The weight ``name``, memory-mapped unless it is small."""
        file = self._file(self.files[name])
        weight = file[name] if isinstance(file, dict) else file.get_tensor(name)
        self._mapped += weight.nbytes
        return weight.clone() if weight.nbytes <= _COPIED_BYTES else weight

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight; its values are not read."""
        file = self._file(self.files[name])
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    def _file(self, path: Path) -> Any:
        if path != self._path or (self._mapped > _MAPPED_BYTES and path.suffix == ".safetensors"):
            self._open, self._path, self._mapped = None, path, 0  # the last file is closed before the next is opened
            self._open = open_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
        return self._open

    def _check_index(self, suffix: str) -> None:
        name = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
        if (self.directory / name).is_file():
            for weight, file in read_index(self.directory / name).items():
                if self.files.get(weight) != self.directory / file:
                    raise UserError(
                        f"{self.directory / name} says that {file} holds {weight!r}, but it does not; the files are of "
                        "different checkpoints. Copy the checkpoint again"
                    )


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: the file of each weight.

    Raises:
        UserError: it is not a JSON object with a weight map.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); copy it again") from error


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a ``.bin`` file of tensors. A file that holds anything but plain data is refused.

    Raises:
        UserError: loading the pickle would run code, or it does not hold tensors by name.
    """
    import pickle
    import zipfile

    try:
        # Files from torch versions before 1.6 are not zip archives and cannot be memory-mapped.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(
            f"{path} is refused: it is damaged or holds more than plain tensors, and opening it could run code "
            f"({str(error).splitlines()[0]}). Convert it to safetensors if you trust it."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors; get it again")
    return weights


class ShardWriter:
    """Writes a checkpoint directory: ``write`` each tensor, then ``close``.

    Files are named as transformers names them: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` with an
    index. A safetensors header may end in spaces, so each shard starts with reserved space, and the header is written
    there after the last tensor.

    Attributes:
        shards: the names of the weights in each finished shard, whose file has been flushed to disk.
    """

    def __init__(self, directory: Path, *, shard_bytes: int | None = None) -> None:
        """``shard_bytes``: size at which a shard is closed; None: ``SHARD_BYTES``."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
        self.shards: list[list[str]] = []
        self.shard_size = 0
        """Bytes of tensors in the open shard."""
        self._names: set[str] = set()
        self._file: IO[bytes] | None = None
        self._header: dict[str, object] = {}

    def reuse(self, shards: list[list[str]]) -> None:
        """Continue after shards that an earlier, interrupted writer finished in this directory."""
        assert self._file is None and not self.shards
        for names in shards:
            self.shards.append(list(names))
            self._names.update(names)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor, on any device and in any memory layout."""
        assert name not in self._names, name
        if self._file is None:
            self._file = self._shard_path(len(self.shards)).open("wb")
            self._file.write(b" " * _HEADER_BYTES)
            self._header, self.shard_size = {"__metadata__": {"format": "pt"}}, 0
        data = tensor.detach().cpu().contiguous()
        start, self.shard_size = self.shard_size, self.shard_size + data.nbytes
        self._header[name] = {
            "dtype": DTYPES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [start, self.shard_size],
        }
        self._names.add(name)
        # As bytes, because NumPy has no bfloat16.
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        if self.shard_size >= self.shard_bytes or len(self._header) > _MAX_TENSORS:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Close the open shard, if there is one. Its bytes are on disk when this returns."""
        if self._file is None:
            return
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= _HEADER_BYTES - 8, (len(header), len(self._header))
        self._file.seek(0)
        self._file.write((_HEADER_BYTES - 8).to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.shard_size = 0
        self.shards.append([name for name in self._header if name != "__metadata__"])

    def close(self) -> None:
        """Finish the last shard, rename all shards, and write an index if there are several."""
        self.finish_shard()
        count = len(self.shards)
        weight_map, total = {}, 0
        for index, members in enumerate(self.shards):
            name = "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            shard = self._shard_path(index)
            if shard.exists():  # else an interrupted ``close`` has renamed it
                shard.rename(self.directory / name)
            total += (self.directory / name).stat().st_size - _HEADER_BYTES
            weight_map.update(dict.fromkeys(members, name))
        if count > 1:
            index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1) + "\n")

    def abandon(self) -> None:
        """Delete the open shard and keep the finished ones."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk also refuses what is still buffered
                self._file.close()
            self._file = None
            self._shard_path(len(self.shards)).unlink(missing_ok=True)

    def _shard_path(self, index: int) -> Path:
        return self.directory / f".shard-{index}"


def copy_model_files(source: Path, target: Path) -> None:
    """Copy weights, configuration and processor of a model. Of weights in two formats, copy those that are loaded."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (*weight_files(source), *source.glob("*.json")):
        if weight_files(source)[0].suffix == ".safetensors" and file.name == "pytorch_model.bin.index.json":
            continue
        shutil.copyfile(file, target / file.name)  # without the mode of the source
