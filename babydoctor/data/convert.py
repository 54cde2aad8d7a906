"""Convert rows of any form to memory-mapped Arrow (``converted.py``): checked once, with the same fingerprint."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.data.converted import CONVERTED_FILE, DIGESTS_FILE, FORMAT, SPEAKERS
from babydoctor.data.dataset_rows import EMBEDDED
from babydoctor.data.images import ImageFolder
from babydoctor.data.problems import Problem, summarize, write_problems
from babydoctor.data.rows import check_rows, digest_content
from babydoctor.data.sources import SOURCES_FILE, iter_sources, published_versions, read_embedded
from babydoctor.files import atomic_directory, explain_full_disk, write_json
from babydoctor.progress import named_progress
from babydoctor.schema import Sample, UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1000
_BATCH_BYTES = 64 << 20
_SHARD_BYTES = 500 << 20


@dataclass(frozen=True)
class ConvertedSet:
    """The result of ``convert_rows``."""

    num_rows: int
    left_out: Counter[str]
    fingerprint: str


def convert_rows(
    sources: Sequence[str | Path],
    out: Path,
    *,
    images: Path | None = None,
    on_bad: str = "refuse",
    embed_images: bool = False,
) -> ConvertedSet:
    """Write the rows of ``sources``, in order, to the folder ``out``. The folder appears only when it is complete.

    Args:
        images: folder of the images; the file of each row must exist.
        on_bad: ``refuse`` writes nothing if a row is bad; ``quarantine`` leaves bad rows out and lists them in
            ``out/bad.jsonl``.
        embed_images: store the images inside, so that training needs no image folder.

    Raises:
        UserError: a source cannot be read, a row is bad, or ``out`` exists.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another folder, or remove it")
    problems: list[Problem] = []
    with (
        explain_full_disk("the converted rows", out, "free some space and convert again"),
        atomic_directory(out) as folder,
        named_progress() as update,
    ):
        writer = _Writer(folder)
        for result in check_rows(iter_sources(sources, update, "converting"), images):
            if isinstance(result, Problem):
                problems.append(result)
            else:
                writer.add(result, _embedded_bytes(result, images if embed_images else None))
        writer.close()
        num_read = writer.num_rows + len(problems)
        if problems and on_bad == "refuse":
            raise UserError(
                f"{summarize(problems, num_read)}\nNothing was written. Fix or remove them, or leave them out with "
                "--on-bad quarantine"
            )
        if not writer.num_rows:
            raise UserError(f"no good row in {', '.join(map(str, sources))}; nothing was written")
        if problems:
            write_problems(problems, folder / "bad.jsonl")
        if versions := published_versions(sources):
            write_json(folder / SOURCES_FILE, versions)
        record = {
            "format": FORMAT,
            "rows": writer.num_rows,
            "left_out": len(problems),
            "fingerprint": writer.fingerprint,
            "sources": [str(source) for source in sources],
            "images": None if images is None or embed_images else str(images),
        }
        write_json(folder / CONVERTED_FILE, record)
    return ConvertedSet(writer.num_rows, Counter(problem.reason for problem in problems), writer.fingerprint)


def _embedded_bytes(sample: Sample, embed_from: Path | None) -> bytes | None:
    """The encoded image to store with the row, or None."""
    if isinstance(sample.image, bytes) or sample.image is None:
        return sample.image
    if sample.image.startswith(EMBEDDED):
        return read_embedded(sample.image)
    return None if embed_from is None else Path(ImageFolder(embed_from).resolve(sample.image)).read_bytes()


class _Writer:
    """Writes samples as Arrow streams of up to about ``_SHARD_BYTES``, and the metadata that ``datasets`` needs."""

    def __init__(self, folder: Path) -> None:
        from datasets import Features, Image, List, Value

        text = Value("string")
        self._features = Features(
            id=text, conversations=List({"from": text, "value": text}), image=Image(decode=False), system=text
        )
        self._schema: pa.Schema = self._features.arrow_schema
        self._folder = folder
        self._batch: list[dict[str, Any]] = []
        self._batch_bytes = self._shard_bytes = 0
        self._shards: list[str] = []
        self._stream: Any = None
        self._hasher = hashlib.sha256()
        self._digests = (folder / DIGESTS_FILE).open("wb")
        self.num_rows = 0

    @property
    def fingerprint(self) -> str:
        return self._hasher.hexdigest()

    def add(self, sample: Sample, image: bytes | None) -> None:
        """Append a sample. ``image``: its encoded image, if it is stored with the row."""
        path = sample.image if isinstance(sample.image, str) and image is None else None
        turns = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in sample.turns]
        self._batch.append(
            {
                "id": None if sample.id == sample.source else sample.id,
                "conversations": turns,
                "image": None if sample.image is None else {"bytes": image, "path": path},
                "system": sample.system,
            }
        )
        self._batch_bytes += len(image or b"") + sum(len(turn["value"]) for turn in turns)
        digest = digest_content(sample)
        self._digests.write(digest)
        self._hasher.update(digest)
        self.num_rows += 1
        if len(self._batch) == _BATCH_ROWS or self._batch_bytes > _BATCH_BYTES:
            self._write_batch()

    def _write_batch(self) -> None:
        import pyarrow as pa

        if self._stream is not None and self._shard_bytes > _SHARD_BYTES:
            self._stream.close()
            self._stream = None
        if self._stream is None:
            name = f"data-{len(self._shards):05d}.arrow"
            self._shards.append(name)
            self._stream, self._shard_bytes = pa.ipc.new_stream(str(self._folder / name), self._schema), 0
        self._stream.write_batch(pa.RecordBatch.from_pylist(self._batch, schema=self._schema))
        self._shard_bytes += self._batch_bytes
        self._batch, self._batch_bytes = [], 0

    def close(self) -> None:
        """Write the remaining rows and the metadata that ``datasets.load_from_disk`` reads."""
        if self._batch:
            self._write_batch()
        if self._stream is not None:
            self._stream.close()
        self._digests.close()
        write_json(self._folder / "dataset_info.json", {"features": self._features.to_dict()})
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self._shards],
            "_fingerprint": self.fingerprint[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(self._folder / "state.json", state)
