"""The converted form of rows: checked once, memory-mapped, read by index.

``babydoctor data convert`` writes a folder that the ``datasets`` library opens as a saved set, with two more files:

    data-00000.arrow ...  dataset_info.json  state.json     what ``datasets.load_from_disk`` reads
    digests.bin           16 bytes per row; the fingerprint is computed from them without reading the rows
    converted.json        number of rows, fingerprint, rows left out

Processes that map the same files share memory pages, so ranks and data loader workers hold no rows of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from babydoctor.data.dataset_rows import EMBEDDED, open_dataset
from babydoctor.schema import Role, Sample, Turn, UserError

CONVERTED_FILE = "converted.json"
DIGESTS_FILE = "digests.bin"
DIGEST_BYTES = 16
FORMAT = 1

SPEAKERS: dict[Role, str] = {"user": "human", "assistant": "gpt"}
_ROLES: dict[str, Role] = {speaker: role for role, speaker in SPEAKERS.items()}


def is_converted(source: str | Path) -> bool:
    """True for a folder that ``babydoctor data convert`` wrote."""
    return (Path(source) / CONVERTED_FILE).is_file()


class ConvertedRows(Sequence[Sample]):
    """The samples of one or more converted folders, in order. Samples are read on access."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Raises ``UserError`` if a folder is damaged or was written by another version."""
        self.folders = tuple(_ConvertedFolder(str(folder)) for folder in folders)
        self._ends = np.cumsum([len(folder) for folder in self.folders])
        self._kept: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._kept is None else len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self)
        row = row if self._kept is None else int(self._kept[row])
        number = int(np.searchsorted(self._ends, row, side="right"))
        folder = self.folders[number]
        return folder.read(row - (int(self._ends[number]) - len(folder)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @property
    def num_left_out(self) -> int:
        """Bad rows that were left out when the rows were converted."""
        return sum(folder.num_left_out for folder in self.folders)

    @property
    def digests(self) -> np.ndarray:
        """``uint8 [rows, 16]``, memory-mapped if there is one folder."""
        parts = [folder.digests for folder in self.folders]
        digests = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return digests if self._kept is None else digests[self._kept]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the original rows, as ``rows.fingerprint`` computes it."""
        return hashlib.sha256(np.ascontiguousarray(self.digests).data).hexdigest()

    def repeated(self) -> list[tuple[Sample, Sample]]:
        """Pairs of (earlier row, later row) where the later row equals a row of an earlier folder."""
        if len(self.folders) == 1:  # duplicates inside one folder were found when it was converted
            return []
        keys = np.ascontiguousarray(self.digests).view(f"V{DIGEST_BYTES}").ravel()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        later = np.flatnonzero(first[inverse] != np.arange(len(keys)))
        pairs = [(self[int(first[inverse[index]])], self[int(index)]) for index in later]
        return [(one, other) for one, other in pairs if other.id != other.source]  # rows without an id may be equal

    def without(self, sources: set[str]) -> ConvertedRows:
        """The rows, except those at these locations (``Sample.source``)."""
        rest = ConvertedRows([folder.path for folder in self.folders])
        starts = {folder.path: int(end) - len(folder) for folder, end in zip(self.folders, self._ends, strict=True)}
        places = (source.rpartition("#") for source in sources)
        left_out = [starts[path] + int(row) for path, _, row in places]
        rest._kept = np.delete(np.arange(int(self._ends[-1])), left_out)
        return rest


class _ConvertedFolder:
    """One folder. Opened once per process and shared with forked workers."""

    def __init__(self, path: str) -> None:
        self.path = path
        record = _read_record(Path(path))
        self._num_rows, self.num_left_out = int(record["rows"]), int(record["left_out"])
        fix = f"convert the rows again into {path}"
        if record.get("format") != FORMAT:
            raise UserError(f"{path}: written by another version (format {record.get('format')}); {fix}")
        try:
            self.digests = np.memmap(Path(path) / DIGESTS_FILE, np.uint8, mode="r").reshape(-1, DIGEST_BYTES)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}/{DIGESTS_FILE}: cannot be read ({error}); {fix}") from error
        if hashlib.sha256(self.digests.data).hexdigest() != record["fingerprint"]:
            raise UserError(f"{path}: {DIGESTS_FILE} and {CONVERTED_FILE} do not agree; {fix}")
        if len(self._dataset()) != self._num_rows or len(self.digests) != self._num_rows:
            raise UserError(f"{path}: holds {len(self._dataset()):,} rows instead of {self._num_rows:,}; {fix}")

    def __len__(self) -> int:
        return self._num_rows

    def _dataset(self) -> Any:
        return open_dataset(self.path)

    def read(self, row: int) -> Sample:
        table = self._dataset().with_format("arrow")[row : row + 1]
        id, system = table.column("id")[0].as_py(), table.column("system")[0].as_py()
        turns = tuple(Turn(_ROLES[turn["from"]], turn["value"]) for turn in table.column("conversations")[0].as_py())
        source = f"{self.path}#{row}"
        image = table.column("image")[0]
        reference = None
        if image.is_valid:
            reference = f"{EMBEDDED}{source}" if image["bytes"].is_valid else image["path"].as_py()
        return Sample(id=source if id is None else id, turns=turns, image=reference, source=source, system=system)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / CONVERTED_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"rows": record["rows"], "left_out": record["left_out"], "fingerprint": record["fingerprint"], **record}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); convert the rows again") from error
