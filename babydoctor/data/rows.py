"""Rows of data -> checked samples.

Every row becomes one ``Sample`` or one ``Problem`` with a reason. No row is silently changed or replaced by another.
Loading makes the cheap checks only: the layout, and whether the image file exists. Images are decoded later, by the
data loader's workers or by ``babydoctor data check``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from babydoctor.conversation import image_first
from babydoctor.data.converted import ConvertedRows, is_converted
from babydoctor.data.dataset_rows import EMBEDDED
from babydoctor.data.images import ImageFolder
from babydoctor.data.json_rows import UnreadableRow
from babydoctor.data.problems import REASONS, Problem, RowError, summarize, write_problems
from babydoctor.data.row_formats import read_row
from babydoctor.data.sources import iter_rows
from babydoctor.progress import show_progress
from babydoctor.schema import IMAGE_TOKEN, Sample, Turn, UserError

logger = logging.getLogger(__name__)

_NUM_SPOT_CHECKS = 1000
"""Number of image files of converted rows that are checked at the start. The others are checked when they are read."""


def parse_row(row: Any, source: str) -> Sample:
    """Turn one row into a sample; the image goes to the front of the first question.

    The layouts are those of ``row_formats``. A row without an image is text only. Raises ``RowError``.
    """
    id = source
    try:
        if isinstance(row, UnreadableRow):
            raise RowError("not_json", row.detail)
        if not isinstance(row, dict):
            raise RowError("not_a_row", f"a {type(row).__name__}")
        id = str(row["id"]) if row.get("id") is not None else source
        content = read_row(row)
        _check_order(content.turns)
        _check_image_tokens(content.turns, has_image=content.image is not None)
    except RowError as error:
        raise RowError(error.problem.reason, error.problem.detail, source=source, id=id) from None
    turns = content.turns
    if content.image is not None:
        turns = [Turn("user", image_first(turns[0].text)), *turns[1:]]
    return Sample(id=id, turns=tuple(turns), image=content.image, source=source, system=content.system)


def _check_order(turns: Sequence[Turn]) -> None:
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise RowError("turn_order", ", ".join(turn.role for turn in turns[:8]) or "no turn but the system prompt")
    for index, turn in enumerate(turns):
        if not turn.text.strip():
            raise RowError("empty_answer" if turn.role == "assistant" else "empty_question", f"turn {index}")


def _check_image_tokens(turns: Sequence[Turn], *, has_image: bool) -> None:
    counts = [turn.text.count(IMAGE_TOKEN) for turn in turns]
    total = sum(counts)
    if not has_image and total:
        raise RowError("image_token_without_image", f"turn {next(i for i, n in enumerate(counts) if n)}")
    if total > 1:
        raise RowError("image_token_repeated", f"{total} times")
    if has_image and not total:
        raise RowError("image_token_missing", repr(turns[0].text[:60]))
    if has_image and not counts[0]:
        raise RowError("image_token_misplaced", f"turn {counts.index(1)}")


def check_rows(rows: Iterable[tuple[str, Any]], images: str | Path | None) -> Iterator[Sample | Problem]:
    """Yield each row as a sample or a problem: a bad layout, a duplicate, a missing image file.

    An id may repeat: LLaVA-Instruct names rows by their COCO image and asks about one image in several rows. Only a
    row that repeats as a whole is a duplicate.
    """
    folder = ImageFolder(images)
    duplicates = Duplicates()
    for source, row in rows:
        yield duplicates.check(check_row(source, row, folder))


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """One row, checked by itself. If the layout is bad, ``digest`` is empty and ``sample`` is None."""

    sample: Sample | None
    problem: Problem | None
    digest: bytes = b""


def check_row(source: str, row: Any, folder: ImageFolder) -> CheckedRow:
    """Check the layout of a row, and that its image file exists."""
    try:
        sample = parse_row(row, source)
    except RowError as error:
        return CheckedRow(None, error.problem)
    problem = None
    if isinstance(sample.image, str) and not sample.image.startswith(EMBEDDED):
        try:
            folder.resolve(sample.image)
        except RowError as error:
            problem = Problem(source, sample.id, error.problem.reason, error.problem.detail)
    return CheckedRow(sample, problem, _digest(sample))


class Duplicates:
    """Finds rows that equal an earlier row. Memory: about 300 bytes per row."""

    def __init__(self) -> None:
        self._sources: dict[bytes, str] = {}

    def check(self, row: CheckedRow) -> Sample | Problem:
        """The sample, or the problem with it. Rows must be passed in order."""
        if row.sample is None:
            assert row.problem is not None
            return row.problem
        sample = row.sample
        if row.digest in self._sources:
            return Problem(sample.source, sample.id, "duplicate", f"of {self._sources[row.digest]}")
        self._sources[row.digest] = sample.source
        return row.problem or sample


def load_rows(sources: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, Any]]:
    """The raw rows of one or several sources, in order, each with its location."""
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        yield from iter_rows(source)


def load_dataset_rows(
    rows: str | Path | Sequence[str | Path],
    images: str | Path | None,
    on_bad: str = "refuse",
    bad_path: Path | None = None,
) -> Sequence[Sample]:
    """Every good row of the sources, in order: a list, or a view of the converted form, which stays on disk.

    ``on_bad="refuse"``: bad rows raise a ``UserError`` that counts them by reason. ``"quarantine"``: they are left out,
    counted in a warning, and listed in ``bad_path`` (JSON lines) if it is given.
    """
    if on_bad not in ("refuse", "quarantine"):
        raise UserError(f"data.on_bad={on_bad!r}: must be refuse or quarantine")
    sources = [rows] if isinstance(rows, (str, Path)) else list(rows)
    if sources and all(is_converted(source) for source in sources):
        return _open_converted_rows(sources, images, on_bad, bad_path)
    samples: list[Sample] = []
    problems: list[Problem] = []
    for result in show_progress(check_rows(load_rows(sources), images), "reading rows"):
        if isinstance(result, Sample):
            samples.append(result)
        else:
            problems.append(result)
    if problems:
        _refuse_or_list(problems, len(samples) + len(problems), on_bad, bad_path)
    if not samples:
        raise UserError(f"no good row in {rows}" if problems else f"no row in {rows}")
    return samples


def _open_converted_rows(
    folders: Sequence[str | Path], images: str | Path | None, on_bad: str, bad_path: Path | None
) -> ConvertedRows:
    """Rows that were checked when they were converted. Only an even sample of their image files is checked again."""
    samples = ConvertedRows(folders)
    folder = ImageFolder(images)
    if samples.num_left_out:
        logger.warning("%d bad rows were left out of %s when it was converted", samples.num_left_out, folders)
    for index in range(0, len(samples), max(1, len(samples) // _NUM_SPOT_CHECKS)):
        sample = samples[index]
        if isinstance(sample.image, str) and not sample.image.startswith(EMBEDDED):
            try:
                folder.resolve(sample.image)
            except RowError as error:
                reason, detail = error.problem.reason, error.problem.detail
                raise UserError(
                    f"{sample.source}: {REASONS[reason]} ({detail}); set data.images to the folder of the images, or "
                    "convert the rows again without the missing ones"
                ) from None
    problems = [
        Problem(later.source, later.id, "duplicate", f"of {earlier.source}") for earlier, later in samples.repeated()
    ]
    if problems:
        _refuse_or_list(problems, len(samples), on_bad, bad_path)
        samples = samples.without({problem.source for problem in problems})
    return samples


def _refuse_or_list(problems: Sequence[Problem], num_rows: int, on_bad: str, bad_path: Path | None) -> None:
    """Raise ``UserError`` for bad rows, or warn and list them."""
    summary = summarize(problems, num_rows)
    if on_bad == "refuse":
        raise UserError(
            f"{summary}\nSee all of them with `babydoctor data check`, fix or remove them, or train without them "
            "with data.on_bad=quarantine"
        )
    if bad_path is not None:
        write_problems(problems, bad_path)
    logger.warning("%s\nLeft out%s", summary, f"; all of them are listed in {bad_path}" if bad_path else "")


def _digest(sample: Sample) -> bytes:
    hasher = hashlib.sha256()
    image = sample.image if isinstance(sample.image, bytes) else (sample.image or "").encode("utf-8", "surrogatepass")
    if image.startswith(EMBEDDED.encode()):
        image = EMBEDDED.encode()  # the row's number would make every row different
    for part in (sample.id.encode("utf-8", "surrogatepass"), image, *_turn_bytes(sample)):
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()[:16]


def _turn_bytes(sample: Sample) -> Iterator[bytes]:
    if sample.system is not None:
        yield b"system\n" + sample.system.encode("utf-8", "surrogatepass")
    for turn in sample.turns:
        yield turn.role.encode() + b"\n" + turn.text.encode("utf-8", "surrogatepass")


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over ids, text and image references (or embedded bytes) in order, as 64 hex digits.

    A resumed run compares it to make sure that the rows are the same. Image files are not read, and a row without an
    id is hashed without one, so files of rows and images may be moved.
    """
    if isinstance(samples, ConvertedRows):
        return samples.fingerprint
    hasher = hashlib.sha256()
    for sample in samples:
        hasher.update(digest_content(sample))
    return hasher.hexdigest()


def digest_content(sample: Sample) -> bytes:
    """16 bytes that identify a sample's content. The location of a row without an id does not count."""
    return _digest(replace(sample, id="") if sample.id == sample.source else sample)
