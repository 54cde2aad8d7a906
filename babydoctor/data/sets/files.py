"""Shared by all data sets: write rows, place images, unpack archives, report the result."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from babydoctor.data.rows import Problem, Sample, check_rows
from babydoctor.hub import disk_full_error, is_disk_full
from babydoctor.progress import show_progress
from babydoctor.schema import UserError


@dataclass(frozen=True)
class PreparedSplit:
    """The result for one split.

    The source has ``num_read`` rows, of ``num_expected`` published ones (None: unknown). ``num_rows`` good rows were
    written, with ``num_images`` distinct images.
    """

    rows: Path
    images: Path
    num_rows: int
    num_images: int
    num_read: int
    num_expected: int | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    left_out_list: Path | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def naming_a_full_disk(place: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a disk-full error into a ``UserError`` that names the folder."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(place, needed) from error
        raise


@contextmanager
def replace_when_done(path: Path) -> Iterator[IO[str]]:
    """Open a text file that gets its name only when complete. Raises ``UserError`` if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    errors = "backslashreplace"  # the same escape as JSON uses for lone surrogates
    with naming_a_full_disk(path), partial.open("w", encoding="utf-8", errors=errors) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Stream rows to a JSON list, one row per line. Returns their number."""
    count = 0
    with replace_when_done(path) as file:
        file.write("[")
        for count, row in enumerate(rows, start=1):
            file.write((",\n" if count > 1 else "\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
    return count


def write_left_out(path: Path, left_out: Iterable[dict[str, Any]]) -> Counter[str]:
    """Write the rows left out as JSON lines, each with a ``reason``. Returns their number by reason."""
    counts: Counter[str] = Counter()
    with replace_when_done(path) as file:
        for item in left_out:
            counts[item["reason"]] += 1
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    return counts


def link_folder(source: Path, out: Path) -> Path:
    """Make ``out/images`` a symbolic link to the image folder, which takes no space even across file systems.

    Raises ``UserError`` if ``out/images`` already is something else.
    """
    target = out / "images"
    if target.resolve() == source.resolve():
        return target
    if target.is_symlink() or target.exists():
        what = f"already links to {target.resolve()}" if target.is_symlink() else "already holds images"
        raise UserError(f"{target} {what}, not to {source}; give another --out, use --copy, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve(), target_is_directory=True)
    return target


def gather_images(source: Path, out: Path, names: Iterable[str], *, copy: bool) -> Path:
    """Link or copy the named images into ``out/images``, which several sources may share.

    Hard links take no space. With ``copy``, or if the file system cannot link, files are copied. Existing files of the
    same size are kept, so an interrupted run resumes.
    """
    target = out / "images"
    if target.resolve() == source.resolve():
        return target
    if target.is_symlink():
        raise UserError(f"{target} links to {target.resolve()}; give another --out, or remove the link")
    target.mkdir(parents=True, exist_ok=True)
    for name in show_progress(sorted(set(names)), "gathering images"):
        original, place = source / name, target / name
        if place.exists() and place.stat().st_size == original.stat().st_size:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(place.name + ".partial")
        partial.unlink(missing_ok=True)
        if copy or not _hard_link(original, partial):
            with naming_a_full_disk(target):
                shutil.copyfile(original, partial)
        partial.replace(place)
    return target


def _hard_link(original: Path, place: Path) -> bool:
    try:
        place.hardlink_to(original)
    except OSError:  # another file system, or one without hard links
        return False
    return True


def keep_good_rows(
    rows: Iterable[tuple[str, Any]], images: Path, bad: list[Problem], seen: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the good rows whose image exists.

    Appends the other rows to ``bad`` and the images of the good ones to ``seen``.
    """
    raw, to_check = itertools.tee(rows)
    for (_, row), result in show_progress(zip(raw, check_rows(to_check, images), strict=True), "reading rows"):
        if isinstance(result, Sample):
            if isinstance(result.image, str):
                seen.append(result.image)
            yield row
        else:
            bad.append(result)


def prepare_llava_rows(
    rows: Iterable[tuple[str, Any]],
    images: Path,
    out: Path,
    *,
    name: str,
    num_expected: int | None,
    copy: bool,
    share: bool = False,
) -> PreparedSplit:
    """Write ``out/{name}.json`` with the good rows, ``out/{name}-left-out.jsonl`` with the others, and the images.

    ``share``: the image folder also holds images of other splits.
    """
    bad: list[Problem] = []
    seen: list[str] = []
    path, list_path = out / f"{name}.json", out / f"{name}-left-out.jsonl"
    num_rows = write_rows(path, keep_good_rows(rows, images, bad, seen))
    left_out = write_left_out(
        list_path, ({"reason": p.reason, "id": p.id, "source": p.source, "detail": p.detail} for p in bad)
    )
    return PreparedSplit(
        rows=path,
        images=gather_images(images, out, seen, copy=copy) if copy or share else link_folder(images, out),
        num_rows=num_rows,
        num_images=len(set(seen)),
        num_read=num_rows + len(bad),
        num_expected=num_expected,
        left_out=left_out,
        left_out_list=list_path,
    )


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack an archive. Existing files of the right size are kept, so an interrupted run resumes.

    Raises ``UserError`` for a damaged archive, a member outside ``folder``, or too little disk space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve()
    try:
        with zipfile.ZipFile(archive) as packed:
            missing = _missing_members(packed, archive, root)
            needed, free = sum(member.file_size for member in missing), shutil.disk_usage(folder).free
            if needed > free:
                raise disk_full_error(folder, needed)
            with naming_a_full_disk(folder):
                for member in show_progress(missing, f"unpacking {archive.name}", total=len(missing)):
                    packed.extract(member, folder)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: is damaged or cut off ({error}); remove it and download it again") from error
    except (NotImplementedError, RuntimeError) as error:  # an unknown compression; a password
        raise UserError(f"{archive}: cannot be unpacked here ({error}); unpack it by hand into {folder}") from error


def _missing_members(packed: zipfile.ZipFile, archive: Path, root: Path) -> list[zipfile.ZipInfo]:
    missing = []
    for member in packed.infolist():
        place = (root / member.filename).resolve()
        if not place.is_relative_to(root):
            raise UserError(f"{archive}: its member {member.filename!r} would be unpacked outside {root}")
        if not member.is_dir() and not (place.is_file() and place.stat().st_size == member.file_size):
            missing.append(member)
    return missing
