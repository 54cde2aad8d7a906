"""``babydoctor data check``: check every row and decode every image once, on all cores.

This process reads rows at the rate at which images are decoded and sends them to the workers in chunks. It takes the
results in row order, so the report does not depend on the number of workers. Memory: about 500 bytes per row.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from babydoctor.conversation import Template, get_template, render
from babydoctor.cores import num_cores
from babydoctor.data.check.workers import CheckTask, InProcess, WorkerProcesses, Workers
from babydoctor.data.images import ImageFolder, read_image
from babydoctor.data.problems import Problem
from babydoctor.data.rows import CheckedRow, Duplicates, check_row
from babydoctor.data.sources import iter_sources
from babydoctor.imaging.isolation import DecodePool
from babydoctor.progress import named_progress
from babydoctor.schema import Example, Sample, UserError

_ROWS_PER_TASK = 100
_BYTES_PER_TASK = 8 << 20
_IMAGES_PER_TASK = 4
_FEW_ROWS = 16
"""Up to this many rows are checked in this process, because starting workers takes longer."""

_CHUNKS_AHEAD = 4  # per worker


@dataclass(frozen=True)
class CheckSettings:
    """What to check. Lengths of rows are checked only with a ``tokenizer`` (folder or hub id)."""

    images: Path | None = None
    tokenizer: str | None = None
    template: str = "llava_llama_2"
    max_length: int = 2048
    num_patches: int = 256


@dataclass
class CheckReport:
    """The result. ``problems``: bad rows first, then rows of a bad length, then bad images, each in order."""

    num_rows: int = 0
    num_images: int = 0
    num_repeated_ids: int = 0
    problems: list[Problem] = field(default_factory=list)
    samples_with_image: list[Sample] = field(default_factory=list)
    """Without their turns. Empty unless ``keep_samples`` was set."""


def check_sources(
    sources: Sequence[str | Path],
    settings: CheckSettings,
    *,
    num_processes: int | None = None,
    keep_samples: bool = False,
) -> CheckReport:
    """Check the rows of ``sources`` and decode their images.

    Args:
        num_processes: number of workers; None: one for each core that this process may use.
        keep_samples: fill ``samples_with_image``.

    Raises:
        UserError: a source cannot be read, the image folder or the tokenizer is missing, or a worker died.
    """
    ImageFolder(settings.images)  # report a missing folder before any work starts
    start = functools.partial(_RowChecker, settings)
    with named_progress() as update:
        chunks = _chunks(iter_sources(sources, update, "checking"))
        first, second = next(chunks, None), next(chunks, None)
        ahead = (chunk for chunk in (first, second) if chunk is not None)
        check = _Check(itertools.chain(ahead, chunks), keep_samples)
        number = num_processes or num_cores()
        is_small = first is None or (second is None and len(first.rows) <= _FEW_ROWS)
        if number == 1 or is_small:
            return check.run(InProcess(start), 1)
        with WorkerProcesses(number, start) as workers:
            return check.run(workers, number)


def load_template(template: str, tokenizer: str) -> tuple[Template, Any]:
    """A template and a tokenizer. Raises ``UserError`` if one does not exist, or the tokenizer lacks tokens for it."""
    from babydoctor.data.template_tokens import check_template
    from babydoctor.data.tokens import load_tokenizer

    chosen, loaded = get_template(template), load_tokenizer(tokenizer)
    check_template(chosen, loaded, tokenizer, fix="give --template {template}")
    return chosen, loaded


def encode_sample(sample: Sample, template: Template, tokenizer: Any, num_patches: int) -> Example:
    """Render and tokenize a sample at its full length. Raises ``UserError`` if it does not fit the template."""
    from babydoctor.data.tokens import encode

    images = () if sample.image is None else (sample.image,)
    turns = render(sample.turns, template, system=sample.system)
    return encode(turns, tokenizer, num_patches, id=sample.id, images=images)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive rows, each as a pickled ``(source, row)``."""

    number: int
    rows: list[bytes]
    sources: list[str]


def _chunks(rows: Iterable[tuple[str, Any]]) -> Iterator[_Chunk]:
    """Chunks of rows. Their size is limited in bytes too, because rows may hold whole images."""
    number, chunk, num_bytes = 0, _Chunk(0, [], []), 0
    for source, row in rows:
        chunk.rows.append(pickle.dumps((source, row)))
        chunk.sources.append(source)
        num_bytes += len(chunk.rows[-1])
        if len(chunk.rows) == _ROWS_PER_TASK or num_bytes > _BYTES_PER_TASK:
            yield chunk
            number, num_bytes = number + 1, 0
            chunk = _Chunk(number, [], [])
    if chunk.rows:
        yield chunk


class _RowChecker:
    """A worker's task: check the rows of a chunk, each by itself, or decode images."""

    def __init__(self, settings: CheckSettings, large_images: AbstractContextManager[Any]) -> None:
        self._settings = settings
        self._folder = ImageFolder(settings.images)
        self._tokenizer: Any = None
        self._pool = DecodePool(size=1, large_images=large_images)
        if settings.tokenizer is not None:
            self._template, self._tokenizer = load_template(settings.template, settings.tokenizer)

    def __call__(self, task: _Chunk | list[str | bytes], report: Callable[[int], None]) -> Any:
        if not isinstance(task, _Chunk):
            return [self._check_image(image, report, index) for index, image in enumerate(task)]
        return [self._check_row(row, report, index) for index, row in enumerate(task.rows)]

    def _check_row(self, row: bytes, report: Callable[[int], None], index: int) -> tuple[CheckedRow, Problem | None]:
        """The row without its turns, which are no longer needed, and the problem with its length, if any."""
        report(index)
        source, content = pickle.loads(row)
        checked = check_row(source, content, self._folder)
        if checked.sample is None:
            return checked, None
        length_problem = None if self._tokenizer is None else self._check_length(checked.sample)
        return replace(checked, sample=replace(checked.sample, turns=(), system=None)), length_problem

    def _check_length(self, sample: Sample) -> Problem | None:
        settings = self._settings
        try:
            length = len(encode_sample(sample, self._template, self._tokenizer, settings.num_patches))
        except UserError as error:
            return Problem(sample.source, sample.id, "template", str(error))
        if length <= settings.max_length:
            return None
        return Problem(sample.source, sample.id, "too_long", f"{length:,} of at most {settings.max_length:,}")

    def _check_image(self, image: str | bytes, report: Callable[[int], None], index: int) -> str | None:
        """The problem with an image, if any."""
        report(index)
        try:
            read_image(image, self._folder, self._pool)
        except UserError as error:
            return str(error)
        return None


@dataclass(frozen=True, slots=True)
class _Use:
    """A row with an image."""

    number: int
    source: str
    id: str


class _Check:
    """Hands tasks to the workers and combines their results."""

    def __init__(self, chunks: Iterator[_Chunk], keep_samples: bool) -> None:
        self._chunks = chunks
        self._keep_samples = keep_samples
        self._report = CheckReport()
        self._next_chunk = 0
        self._num_chunks_dealt = 0
        self._all_read = False
        self._done_chunks: dict[int, list[tuple[CheckedRow, Problem | None]]] = {}
        self._duplicates = Duplicates()
        self._length_problems: list[Problem] = []
        self._image_problems: list[tuple[int, Problem]] = []
        # Ids and images are compared by 64-bit hashes: among 15 million, a collision has a probability of 6e-6.
        self._ids: set[int] = set()
        self._images: set[int] = set()
        self._bad_images: dict[int, str] = {}
        self._uses: dict[str | bytes, list[_Use]] = {}
        self._backlog: deque[str | bytes] = deque()

    def run(self, workers: Workers, num_workers: int) -> CheckReport:
        while True:
            while workers.has_room and (task := self._next_task(_CHUNKS_AHEAD * num_workers)) is not None:
                workers.submit(task)
            if not workers.num_running:
                break
            task, result = workers.wait()
            if isinstance(task.payload, _Chunk):
                self._done_chunks[task.payload.number] = result
                self._take_chunks()
            else:
                self._take_images(task.payload, result)
        assert not self._done_chunks and not self._uses, (self._next_chunk, len(self._uses))
        report = self._report
        self._image_problems.sort(key=lambda item: item[0])
        report.problems += [*self._length_problems, *(problem for _, problem in self._image_problems)]
        report.num_images = len(self._images)
        return report

    def _next_task(self, max_chunks: int) -> CheckTask | None:
        """Submit images before rows, so that few images wait in memory."""
        is_last = self._all_read and self._next_chunk == self._num_chunks_dealt
        if len(self._backlog) >= _IMAGES_PER_TASK or (self._backlog and is_last):
            images = [self._backlog.popleft() for _ in range(min(_IMAGES_PER_TASK, len(self._backlog)))]
            return CheckTask(images, [self._uses[image][0].source for image in images])
        if self._all_read or self._num_chunks_dealt - self._next_chunk >= max_chunks:
            return None
        chunk = next(self._chunks, None)
        if chunk is None:
            self._all_read = True
            return self._next_task(max_chunks)
        self._num_chunks_dealt += 1
        return CheckTask(chunk, chunk.sources)

    def _take_chunks(self) -> None:
        """Take the finished chunks, in order."""
        while (results := self._done_chunks.pop(self._next_chunk, None)) is not None:
            self._next_chunk += 1
            for row, length_problem in results:
                self._take_row(row, length_problem)

    def _take_row(self, row: CheckedRow, length_problem: Problem | None) -> None:
        report = self._report
        report.num_rows += 1
        sample = self._duplicates.check(row)
        if isinstance(sample, Problem):
            report.problems.append(sample)
            return
        if length_problem is not None:
            self._length_problems.append(length_problem)
        if hash(sample.id) in self._ids:
            report.num_repeated_ids += 1
        self._ids.add(hash(sample.id))
        if sample.image is None:
            return
        if self._keep_samples:
            report.samples_with_image.append(sample)
        use, key = _Use(report.num_rows, sample.source, sample.id), hash(sample.image)
        if sample.image in self._uses:
            self._uses[sample.image].append(use)
        elif key not in self._images:
            self._images.add(key)
            self._uses[sample.image] = [use]
            self._backlog.append(sample.image)
        elif key in self._bad_images:
            self._add_image_problem(use, self._bad_images[key])

    def _take_images(self, images: Sequence[str | bytes], details: Sequence[str | None]) -> None:
        for image, detail in zip(images, details, strict=True):
            uses = self._uses.pop(image)
            if detail is not None:
                self._bad_images[hash(image)] = detail
                for use in uses:
                    self._add_image_problem(use, detail)

    def _add_image_problem(self, use: _Use, detail: str) -> None:
        self._image_problems.append((use.number, Problem(use.source, use.id, "image_undecodable", detail)))
