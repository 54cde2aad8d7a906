"""Rows and embedded images of data sets that the ``datasets`` library opens: parquet, Arrow, saved sets, the hub."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from babydoctor.hub import data_set_error, describe
from babydoctor.schema import UserError

EMBEDDED = "embedded://"
"""Reference to an image that is stored in a data set: ``embedded://SOURCE#ROW``."""


def split_of(source: str) -> tuple[Path, str | None]:
    """Split ``path:split`` into path and split. A colon in an existing path is part of that path."""
    if Path(source).exists() or ":" not in source:
        return Path(source), None
    path, split = source.rsplit(":", 1)
    return Path(path), split


@functools.lru_cache(maxsize=8)
def open_dataset(source: str) -> Any:
    """Open a data set, memory-mapped, with undecoded images. Cached, because workers read one image at a time."""
    import datasets

    path, split = split_of(source)
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(path))
        elif source.endswith((".parquet", ".arrow")):
            kind = "arrow" if source.endswith(".arrow") else "parquet"
            loaded = datasets.load_dataset(kind, data_files=source, split="train")
        else:  # a directory of parquet or JSON files, or a hub id; file names give the splits
            loaded = datasets.load_dataset(str(path))
    except Exception as error:  # the library raises its own errors and those of pyarrow, the hub client and the network
        if not path.exists() and "://" not in source:
            hint = "Offline, give a file or a directory that is already here"
            raise data_set_error(error, str(path), hint=hint) from error
        raise UserError(f"{source}: cannot be opened as a data set ({describe(error)})") from error
    if isinstance(loaded, dict):
        name = split or ("train" if "train" in loaded else "")
        if name not in loaded:
            raise UserError(
                f"{source}: has the splits {', '.join(loaded)}; name one, as in {path}:{next(iter(loaded))}"
            )
        loaded = loaded[name]
    elif split is not None:
        raise UserError(f"{source}: has no splits; leave out {':' + split!r}")
    if isinstance(loaded.features.get("image"), datasets.Image):
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
    return loaded


def iter_dataset(source: str, progress: Callable[[float], None]) -> Iterator[tuple[str, Any]]:
    """Yield ``(location, row)`` for each row. ``progress`` gets the fraction of the rows read so far."""
    dataset = open_dataset(source)
    index = 0
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "image"}
        images = _image_column(table, source, index) if "image" in table.column_names else None
        for offset in range(table.num_rows):
            row = {name: values[offset] for name, values in columns.items()}
            for name in ("conversations", "conversatons", "messages"):
                if name in row:
                    row[name] = _turns_of(row[name])
            if images is not None and images[offset] is not None:
                row["image"] = images[offset]
            if "images" in row:
                row["images"] = _refer_to_embedded(row["images"], f"{EMBEDDED}{source}#{index}")
            yield f"{source}#{index}", row
            index += 1
        progress(index / max(1, len(dataset)))


def _image_column(table: Any, source: str, start: int) -> list[str | None]:
    """One reference per row: the file name, the row number of an embedded image, or None for text only."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column("image")
    if pa.types.is_struct(column.type):
        names = pc.struct_field(column, "path").to_pylist()
        embedded = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        names, embedded = [None] * len(column), pc.is_valid(column).to_pylist()
    else:
        return column.to_pylist()
    return [
        f"{EMBEDDED}{source}#{start + offset}" if has_bytes else name
        for offset, (name, has_bytes) in enumerate(zip(names, embedded, strict=True))
    ]


def _refer_to_embedded(images: Any, reference: str) -> Any:
    """Replace an embedded image in a list of one by a reference, so its bytes do not stay in memory."""
    if not isinstance(images, list) or len(images) != 1:
        return images
    image = images[0]
    is_embedded = isinstance(image, bytes) or (isinstance(image, dict) and image.get("bytes") is not None)
    return [reference] if is_embedded else images


def _turns_of(value: Any) -> Any:
    """Restore a list of objects that was stored as an object of lists (``datasets``) or as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        keys = list(value)
        return [dict(zip(keys, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value


def read_dataset_image(source: str, row: int) -> bytes:
    """The encoded bytes of a row's image. Raises ``UserError`` if the row has no image."""
    table = open_dataset(source).with_format("arrow")[row : row + 1]  # undecoded
    images = [table.column(name).to_pylist()[0] for name in ("image", "images") if name in table.column_names]
    image = next((image for image in images if image), None)
    image = image[0] if isinstance(image, list) else image
    data = image["bytes"] if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise UserError(f"{EMBEDDED}{source}#{row}: the data set no longer holds an image there; was it rewritten?")
    return data
