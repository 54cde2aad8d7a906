"""Write the rows of several splits one by one, with no patient or article in two splits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from babydoctor.data.images import ImageFolder
from babydoctor.data.problems import RowError
from babydoctor.data.sets.files import PreparedSplit, gather_images, link_folder, replace_when_done

SPLITS = ("test", "validation", "train")
"""Splits in the order in which they must be written. Groups of an earlier split are left out of later ones."""


@dataclass
class _SplitFile:
    file: IO[str]
    num_rows: int = 0
    num_read: int = 0
    images: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)


class SplitWriter:
    """Writes ``out/SPLIT.json`` for each split with rows, and ``out/left-out.jsonl``. A context manager.

    Memory: one entry for each group (patient, article) and each image.
    """

    def __init__(self, out: Path, images: Path, *, group: str, keep_shared: bool = False) -> None:
        """``group``: ``patient`` or ``article``. ``keep_shared``: keep rows whose group is in an earlier split."""
        self.out, self.images = out, images
        self._group, self._keep_shared = group, keep_shared
        self._folder = ImageFolder(images)
        self._splits: dict[str, _SplitFile] = {}
        self._split_of: dict[str, str] = {}
        self._num_shared: Counter[str] = Counter()
        self._files = ExitStack()
        self._list_path = out / "left-out.jsonl"

    def __enter__(self) -> SplitWriter:
        self._list = self._files.enter_context(replace_when_done(self._list_path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for split in self._splits.values():
                split.file.write("\n]\n")
        self._files.__exit__(kind, error, trace)

    def _open(self, name: str) -> _SplitFile:
        assert name in SPLITS, name
        if name not in self._splits:
            file = self._files.enter_context(replace_when_done(self.out / f"{name}.json"))
            file.write("[")
            self._splits[name] = _SplitFile(file)
        return self._splits[name]

    def add(self, name: str, row: dict[str, Any], group: str) -> bool:
        """Write a row, unless its image is missing or its group is in an earlier split. True if it was written."""
        split = self._open(name)
        try:
            self._folder.resolve(row["image"])
        except RowError as error:
            self.leave_out(name, error.problem.reason, row["id"], error.problem.detail)
            return False
        first = self._split_of.setdefault(group, name)
        if first != name:
            self._num_shared[name] += 1
            if not self._keep_shared:
                self.leave_out(name, f"{self._group}_shared", row["id"], f"{group} is in {first}")
                return False
        split.file.write((",\n" if split.num_rows else "\n") + json.dumps(row, ensure_ascii=False))
        split.num_rows += 1
        split.num_read += 1
        split.images.add(row["image"])
        return True

    def leave_out(self, name: str, reason: str, id: str, detail: str = "") -> None:
        """Count a row that is not written, and list it with the reason."""
        split = self._open(name)
        split.num_read += 1
        split.left_out[reason] += 1
        item = {"reason": reason, "split": name, "id": id, "detail": detail}
        self._list.write(json.dumps(item, ensure_ascii=False) + "\n")

    def finish(
        self, *, copy: bool, expected: dict[str, int] | None = None, notes: tuple[str, ...] = ()
    ) -> list[PreparedSplit]:
        """Place the images. Call it after the context has ended. ``train`` comes first.

        Args:
            expected: published number of rows of each split, for sources that may be incomplete.
            notes: reported with the first split.
        """
        names = set().union(*(split.images for split in self._splits.values())) if self._splits else set()
        images = gather_images(self.images, self.out, names, copy=True) if copy else link_folder(self.images, self.out)
        prepared: list[PreparedSplit] = []
        for name in reversed(SPLITS):
            if name not in self._splits:
                continue
            split = self._splits[name]
            shared = self._num_shared[name] if self._keep_shared else 0
            also = (f"{shared:,} of its rows are of {self._group}s that another split has too",) if shared else ()
            prepared.append(
                PreparedSplit(
                    rows=self.out / f"{name}.json",
                    images=images,
                    num_rows=split.num_rows,
                    num_images=len(split.images),
                    num_read=split.num_read,
                    num_expected=(expected or {}).get(name),
                    left_out=split.left_out,
                    left_out_list=self._list_path,
                    notes=(*(() if prepared else notes), *also),
                )
            )
        return prepared


def held_out(group: str, share: float, seed: int) -> bool:
    """True for this share of the groups. It depends only on the group's name and the seed."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
