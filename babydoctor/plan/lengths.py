"""Tokens per sample: measured if the rows are on this disk, else known for the published sets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from babydoctor.config import DataConfig
from babydoctor.data.packing import common_prefix
from babydoctor.schema import IGNORE_INDEX, Example, Sample, UserError

MAX_MEASURED = 500
"""Rows to tokenize, spread evenly over the set."""


@dataclass(frozen=True)
class TokenStatistics:
    """Means per sample. ``num_tail`` counts the tokens from the first loss position on. All samples begin with the
    same ``num_prefix`` of their ``num_tokens``."""

    num_samples: int
    num_tokens: float
    num_tail: float
    num_supervised: float
    num_images: float
    source: str
    num_prefix: int = 0

    @property
    def num_own(self) -> float:
        """Tokens per sample after the shared prefix."""
        return self.num_tokens - self.num_prefix


# The published sets, in tokens of LLaMA-2's vocabulary: rows, text around the answer, how much of it is the system
# prompt, supervised tokens, and the tail from the first loss position on. Row counts are from the sets' cards.
# - roco: 65,422 training rows; the mean of ROCO's 8,180 validation captions is 37.2 tokens (median 31, 95% below 88,
#   longest 593), measured with LLaMA-2's SentencePiece vocabulary; the question and template take 80.
# - lcs: estimated from the published JSON (181 MB for 558,128 rows is 324 bytes per row, about 70 of them caption).
# - instruct: estimated from the published JSON of LLaVA-Instruct-150K (229 MB for 157,712 rows is 1,450 bytes per
#   row, about 1,150 of them text, 4 characters per token; three quarters of it are answers). 80K is a subset of it.
_KNOWN_SETS = {
    "roco": (65_422, 80, 76, 40, 40, "ROCO's validation captions, measured"),
    "lcs": (558_128, 1, 0, 18, 18, "size of the published JSON, estimated"),
    "instruct": (80_000, 130, 76, 215, 260, "size of the published JSON of LLaVA-Instruct-150K, estimated"),
}


def known_statistics(data: DataConfig, num_patches: int) -> TokenStatistics:
    """Statistics of the published set that ``data.rows`` names by its folder: ``lcs``, ``instruct`` or ``roco``.

    Raises:
        UserError: the folder names none of these sets.
    """
    for name, (rows, around, prefix, supervised, tail, source) in _KNOWN_SETS.items():
        if any(name in path.lower() for path in data.rows):
            return TokenStatistics(
                num_samples=rows,
                num_tokens=min(data.max_length, num_patches + around + supervised),
                num_tail=tail,
                num_supervised=supervised,
                num_images=1,
                source=f"{name}: {source}",
                num_prefix=prefix,
            )
    raise UserError(
        f"data.rows={', '.join(data.rows)!r} does not exist, and its name is none of the known sets "
        f"({', '.join(_KNOWN_SETS)}), so its length is unknown; write the rows first (babydoctor data ...)"
    )


def measure_statistics(samples: Sequence[Sample], encode: Callable[[Sample], Example]) -> TokenStatistics:
    """Tokenize up to ``MAX_MEASURED`` samples, evenly spread. Samples that cannot be encoded are skipped.

    Raises:
        UserError: not one sample could be encoded.
    """
    stride = max(1, len(samples) // MAX_MEASURED)
    examples = []
    for index in range(0, min(len(samples), stride * MAX_MEASURED), stride):
        try:
            examples.append(encode(samples[index]))
        except UserError:
            continue
    if not examples:
        raise UserError("no sample could be encoded, so there is nothing to plan; see `babydoctor data check`")
    statistics = summarize_examples(examples)
    return replace(statistics, num_samples=len(samples), source=f"{len(examples)} of the {len(samples)} rows")


def summarize_examples(examples: Sequence[Example]) -> TokenStatistics:
    """Means over examples."""
    count = len(examples)
    return TokenStatistics(
        num_samples=count,
        num_tokens=sum(len(example) for example in examples) / count,
        num_tail=sum(_tail(example) for example in examples) / count,
        num_supervised=sum(example.num_supervised for example in examples) / count,
        num_images=sum(len(example.images) for example in examples) / count,
        source=f"{count} examples",
        num_prefix=common_prefix(examples),
    )


def _tail(example: Example) -> int:
    supervised = (example.labels[1:] != IGNORE_INDEX).nonzero()[0]
    return len(example) - int(supervised[0]) if len(supervised) else 1


def find_statistics(data: DataConfig, language_model: str, num_patches: int) -> TokenStatistics:
    """Measure the rows if rows and tokenizer are on this disk, else use the statistics of the published set."""
    if not all(Path(rows).exists() for rows in data.rows) or not Path(language_model).is_dir():
        return known_statistics(data, num_patches)
    from babydoctor.conversation import get_template, render
    from babydoctor.data.converted import ConvertedRows, is_converted
    from babydoctor.data.rows import RowError, load_rows, parse_row
    from babydoctor.data.tokens import encode, load_tokenizer

    tokenizer, template = load_tokenizer(language_model), get_template(data.template)

    def encode_sample(sample: Sample) -> Example:
        images = () if sample.image is None else (sample.image,)
        segments = render(sample.turns, template, system=sample.system)
        return encode(segments, tokenizer, num_patches, max_length=data.max_length, id=sample.id, images=images)

    if all(is_converted(rows) for rows in data.rows):
        return measure_statistics(ConvertedRows(data.rows), encode_sample)
    samples = []
    for source, row in load_rows(data.rows):  # no image is opened: `babydoctor data check` does that
        with contextlib.suppress(RowError):
            samples.append(parse_row(row, source))
    return measure_statistics(samples, encode_sample)
