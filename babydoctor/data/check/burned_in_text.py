"""Find images of a data set with burned-in text that may identify a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from babydoctor.cores import num_cores
from babydoctor.data.images import ImageFolder, read_image
from babydoctor.data.problems import Problem
from babydoctor.imaging.burned_in import TextBox, TextReader, TextSearchError
from babydoctor.progress import named_progress
from babydoctor.schema import Sample, UserError

Reference = str | bytes


def find_burned_in_text(samples: Sequence[Sample], folder: ImageFolder) -> list[Problem]:
    """Search each image once for names, dates and numbers, on all cores.

    Images that cannot be decoded are skipped; the caller reports them. Problems give kinds and positions, not the text.

    Raises:
        TextSearchError: the extra ``ocr`` is not installed.
    """
    found = dict(_search([sample.image for sample in samples if sample.image is not None], folder))
    return [
        Problem(sample.source, sample.id, *found[sample.image])
        for sample in samples
        if sample.image is not None and sample.image in found
    ]


def _search(references: Iterable[Reference], folder: ImageFolder) -> Iterator[tuple[Reference, tuple[str, str]]]:
    """(image, (reason, detail)) of each image that may identify a person or could not be searched."""
    distinct = list(dict.fromkeys(references))
    num_processes = num_cores()
    reader = TextReader(num_processes, num_threads=1)

    def search(reference: Reference) -> tuple[str, str] | None:
        try:
            image = read_image(reference, folder)
        except UserError:
            return None
        name = reference if isinstance(reference, str) else "embedded image"
        try:
            boxes = [box for box in reader.find(image) if box.is_identifying]
        except TextSearchError as error:
            return "text_search_failed", f"{name}: {error}"
        return ("burned_in_text", f"{name}: {describe(boxes)}") if boxes else None

    reader.check()
    try:
        with ThreadPoolExecutor(num_processes) as pool, named_progress() as update:
            for done, (reference, problem) in enumerate(zip(distinct, pool.map(search, distinct), strict=True), 1):
                update("looking for text", done, len(distinct))
                if problem is not None:
                    yield reference, problem
    finally:
        reader.close()


def describe(boxes: Sequence[TextBox]) -> str:
    """Kinds and positions of texts, for example ``1 name at 12,8-90,20`` (left,top-right,bottom)."""
    counts = Counter(box.kind for box in boxes)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return f"{kinds} at " + " ".join(f"{box.left},{box.top}-{box.right},{box.bottom}" for box in boxes)
