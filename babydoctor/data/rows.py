"""Rows of data -> checked samples, and the order in which training takes them.

Every row becomes one ``Sample`` or one ``Problem`` with a reason; no row is mended in silence, and none is ever
replaced by another. Loading checks what is cheap (form, files there); pictures are decoded later, by the workers of
the training loop or by ``babydoctor data check``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.data.sources import EMBEDDED, UnreadableRow, iter_rows, read_embedded
from babydoctor.schema import IMAGE_TOKEN, Role, Sample, Turn, UserError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

REASONS: dict[str, str] = {
    "not_json": "the line is not JSON",
    "not_a_row": "not an object with a list of conversations",
    "bad_turn": "a turn is not {from: human|gpt, value: text}",
    "system_turn": "a system turn; the system prompt belongs to the template",
    "turn_order": "turns do not go human, gpt, human, gpt ...",
    "empty_answer": "an answer without text",
    "empty_question": "a question with neither text nor image",
    "image_token_missing": f"an image, but no {IMAGE_TOKEN} in the first question",
    "image_token_without_image": f"{IMAGE_TOKEN} in the text, but no image",
    "image_token_repeated": f"more than one {IMAGE_TOKEN}",
    "image_token_misplaced": f"{IMAGE_TOKEN} in an answer or a later question",
    "duplicate": "the same id, image and conversation as an earlier row",
    "too_long": "more tokens than the limit",
    "template": "the conversation does not fit the template",
    "image_path": "an image path that is absolute, leaves the image folder or is no text",
    "image_missing": "the image file is not there",
    "image_undecodable": "the image cannot be decoded",
}
"""Every reason for which a row can be bad, and what it means."""

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row is bad. ``source`` says where it stands, ``reason`` is a key of ``REASONS``."""

    source: str
    id: str
    reason: str
    detail: str


class RowError(UserError):
    """A row that cannot become a sample."""

    def __init__(self, reason: str, detail: str, *, source: str = "", id: str = "") -> None:
        assert reason in REASONS, reason
        self.problem = Problem(source, id, reason, detail)
        super().__init__(f"{source}: {REASONS[reason]}" + (f" ({detail})" if detail else ""))


def parse_row(row: Any, source: str) -> Sample:
    """One row of LLaVA's format -> sample; the image goes to the front of the first question.

    ``row`` is ``{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}``; other keys are ignored, a row
    without ``image`` (or with null) is text only. Raises ``RowError``.
    """
    id = source
    try:
        if isinstance(row, UnreadableRow):
            raise RowError("not_json", row.detail)
        if not isinstance(row, dict):
            raise RowError("not_a_row", f"a {type(row).__name__}")
        id = str(row["id"]) if row.get("id") is not None else source
        image = row.get("image")
        if image is not None and not isinstance(image, (str, bytes)):
            raise RowError("image_path", f"a {type(image).__name__}")
        turns = _parse_turns(row.get("conversations"))
        _check_image_tokens(turns, has_image=image is not None)
    except RowError as error:
        raise RowError(error.problem.reason, error.problem.detail, source=source, id=id) from None
    if image is not None:
        turns[0] = Turn("user", image_first(turns[0].text))
    return Sample(id=id, turns=tuple(turns), image=image, source=source)


def image_first(text: str) -> str:
    """Move ``<image>`` to the front, followed by a newline, as the original LLaVA code does before templating."""
    return (IMAGE_TOKEN + "\n" + text.replace(IMAGE_TOKEN, "").strip()).strip()


def _parse_turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise RowError("not_a_row", "conversations is missing, empty or no list")
    turns: list[Turn] = []
    for index, item in enumerate(conversations):
        speaker, value = (item.get("from"), item.get("value")) if isinstance(item, dict) else (None, None)
        if speaker == "system":
            raise RowError("system_turn", f"turn {index}: {str(value)[:60]!r}")
        if speaker not in _ROLES or not isinstance(value, str):
            raise RowError("bad_turn", f"turn {index}: {str(item)[:80]}")
        if not _is_unicode(value):
            raise RowError("bad_turn", f"turn {index}: holds half of a surrogate pair, which is no text")
        turns.append(Turn(_ROLES[speaker], value))
    expected = ["user", "assistant"] * (len(turns) // 2)
    if [turn.role for turn in turns] != expected:
        raise RowError("turn_order", ", ".join(str(item["from"]) for item in conversations[:8]))
    for index, turn in enumerate(turns):
        if not turn.text.strip():
            raise RowError("empty_answer" if turn.role == "assistant" else "empty_question", f"turn {index}")
    return turns


def _is_unicode(text: str) -> bool:
    """JSON can spell lone surrogates (``\\ud800``), that no tokenizer and no file takes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


class ImageFolder:
    """The folder that rows' images lie in. Checks that a file is there and inside, with one system call a row."""

    def __init__(self, path: str | Path | None) -> None:
        """Raises ``UserError`` where ``path`` is no directory; None stands for rows that bring their images along."""
        if path is not None and not Path(path).is_dir():
            raise UserError(f"image folder {path}: no such directory")
        self.path = None if path is None else os.path.realpath(path)
        self._known_parents: set[str] = set()

    def resolve(self, reference: str) -> str:
        """Reference -> path of the file. Raises ``RowError`` for a path that leaves the folder or a missing file."""
        if not reference or reference.startswith("/") or "\0" in reference or "\\" in reference:
            raise RowError("image_path", repr(reference[:200]))
        parts = reference.split("/")
        if ".." in parts:
            raise RowError("image_path", repr(reference[:200]))
        if self.path is None:
            raise UserError(f"rows name image files such as {reference!r}, but no image folder is given (data.images)")
        path = os.path.join(self.path, *parts)  # noqa: PTH118 (half a million rows: pathlib is ten times slower)
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                self._check_inside(os.path.realpath(path), reference)
                mode = os.stat(path).st_mode  # noqa: PTH116
        except (OSError, UnicodeEncodeError) as error:
            raise RowError("image_missing", f"{path!r} ({getattr(error, 'strerror', None) or error})") from None
        if not stat.S_ISREG(mode):
            raise RowError("image_missing", f"{path} is no file")
        parent = path.rpartition("/")[0]
        if parent not in self._known_parents:
            self._check_inside(os.path.realpath(parent), reference)
            self._known_parents.add(parent)
        return path

    def _check_inside(self, real: str, reference: str) -> None:
        if real != self.path and not real.startswith(str(self.path).rstrip("/") + "/"):
            raise RowError("image_path", f"{reference!r} is a link that leaves the image folder, to {real}")


def read_image(reference: str | bytes, images: str | Path | ImageFolder | None) -> Image.Image:
    """The picture that a sample names, as RGB. Raises ``UserError`` where it is missing, outside or damaged."""
    from babydoctor.imaging.isolation import load_image

    if isinstance(reference, bytes):
        return load_image(reference)
    if reference.startswith(EMBEDDED):
        try:
            return load_image(read_embedded(reference))
        except UserError as error:
            raise UserError(f"{reference}: {error}") from error
    folder = images if isinstance(images, ImageFolder) else ImageFolder(images)
    return load_image(folder.resolve(reference))


def check_rows(rows: Iterable[tuple[str, Any]], images: str | Path | None) -> Iterator[Sample | Problem]:
    """Each row as a sample or as the reason why it is none, in order: form, duplicates, image file there.

    An id alone may come again: LLaVA-Instruct names rows by their COCO image and asks about one image in several
    rows. Only a row that comes again as a whole is a duplicate.
    """
    folder = ImageFolder(images)
    seen: dict[bytes, str] = {}
    for source, row in rows:
        try:
            sample = parse_row(row, source)
            key = _digest(sample)
            if key in seen:
                raise RowError("duplicate", f"of {seen[key]}", source=source, id=sample.id)
            seen[key] = source
            if isinstance(sample.image, str) and not sample.image.startswith(EMBEDDED):
                folder.resolve(sample.image)
        except RowError as error:
            problem = error.problem
            yield problem if problem.source else Problem(source, sample.id, problem.reason, problem.detail)
            continue
        yield sample


def load_rows(sources: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, Any]]:
    """The raw rows of one or several sources, one after the other, each with where it stands."""
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        yield from iter_rows(source)


def load_dataset_rows(
    rows: str | Path | Sequence[str | Path],
    images: str | Path | None,
    on_bad: str = "refuse",
    bad_path: Path | None = None,
) -> list[Sample]:
    """Every good row of the sources, in order.

    ``on_bad="refuse"``: bad rows raise a ``UserError`` that counts them by reason. ``"quarantine"``: they are counted
    in a warning, listed in ``bad_path`` (JSON lines) where it is given, and left out; nothing takes their place.
    """
    if on_bad not in ("refuse", "quarantine"):
        raise UserError(f"data.on_bad={on_bad!r}: must be refuse or quarantine")
    samples: list[Sample] = []
    problems: list[Problem] = []
    for result in show_progress(check_rows(load_rows(rows), images), "reading rows"):
        if isinstance(result, Sample):
            samples.append(result)
        else:
            problems.append(result)
    if problems:
        summary = summarize(problems, len(samples) + len(problems))
        if on_bad == "refuse":
            raise UserError(
                f"{summary}\nSee all of them with `babydoctor data check`, mend or remove them, or train without them "
                "with data.on_bad=quarantine"
            )
        if bad_path is not None:
            write_problems(problems, bad_path)
        logger.warning("%s\nLeft out%s", summary, f"; all of them are listed in {bad_path}" if bad_path else "")
    if not samples:
        raise UserError(f"no good row in {rows}" if problems else f"no row in {rows}")
    return samples


def summarize(problems: Sequence[Problem], num_rows: int, num_shown: int = 5) -> str:
    """Bad rows by reason, and the first few of them, as text of a few lines."""
    counts = Counter(problem.reason for problem in problems).most_common()
    lines = [f"{len(problems):,} of {num_rows:,} rows are bad:"]
    lines += [f"  {count:,} {reason}: {REASONS[reason]}" for reason, count in counts]
    lines += ["first:"]
    lines += [f"  {p.source} (id {p.id}) {p.reason}: {p.detail}" for p in problems[:num_shown]]
    return "\n".join(lines)


def write_problems(problems: Iterable[Problem], path: Path) -> None:
    """Write problems as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")


def show_progress(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Pass items through and show how many have come, on a terminal only and gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=description)


def _digest(sample: Sample) -> bytes:
    hasher = hashlib.sha256()
    image = sample.image if isinstance(sample.image, bytes) else (sample.image or "").encode("utf-8", "surrogatepass")
    if image.startswith(EMBEDDED.encode()):
        image = EMBEDDED.encode()  # the row's number would make every row look different
    for part in (sample.id.encode("utf-8", "surrogatepass"), image, *_turn_bytes(sample)):
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()[:16]


def _turn_bytes(sample: Sample) -> Iterator[bytes]:
    for turn in sample.turns:
        yield turn.role.encode() + b"\n" + turn.text.encode("utf-8", "surrogatepass")


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over ids, text and image references (or embedded bytes) in order, as 64 hex digits.

    Says whether training goes on with the same rows. The files behind the references are not read.
    """
    hasher = hashlib.sha256()
    for sample in samples:
        hasher.update(_digest(sample))
    return hasher.hexdigest()


class StepSampler:
    """Which samples each optimiser step takes. A pure function of the step, so the cursor is the step's number.

    Each epoch goes through all samples once, in a new order made from ``(seed, epoch)``. The last step of an epoch
    takes what is left, so that no sample is lost and none comes twice.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        """``batch_size`` counts samples over all ranks and accumulated micro-batches."""
        assert num_samples > 0 and batch_size > 0, (num_samples, batch_size)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps_per_epoch = -(-num_samples // batch_size)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def samples_of_step(self, step: int) -> list[int]:
        """Indices of the samples of a step; steps count from 0 and go on through the epochs."""
        assert step >= 0, step
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size].tolist()
