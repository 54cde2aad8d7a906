"""What ``bench serve`` asks and reports: questions, timings and figures."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from babydoctor.bench.serve_model import IMAGE_SIZE
from babydoctor.schema import UserError

_FINDINGS = ("an effusion", "a fracture", "a nodule", "free air", "a haematoma", "consolidation", "a shift", "a cyst")
_PLACES = ("left", "right", "upper", "lower", "central", "medial", "lateral", "basal")

SHORT_PROMPT = 314
"""Tokens of a prompt with one of the questions and an image."""


@dataclass(frozen=True, slots=True)
class BenchQuestion:
    """One request: a question and an image file."""

    text: str
    image: bytes


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one answer as its user saw it, in seconds since the request was sent."""

    first_token_s: float
    last_token_s: float
    num_tokens: int

    @property
    def per_token_s(self) -> float:
        return (self.last_token_s - self.first_token_s) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class Figures:
    """The result for one number of users."""

    num_users: int
    tokens_per_s: float
    requests_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    per_token_p50_s: float
    per_token_p95_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second of all users together while they receive answers; time for prompts is not counted."""
        return self.num_users / self.per_token_p50_s if self.per_token_p50_s else 0.0


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Bytes that a decoding step reads: all weights once, and the keys and values of each user."""

    weight_bytes: int
    position_bytes: int
    num_positions: int

    def ceiling(self, num_users: int, bytes_per_s: float) -> float:
        """Tokens per second of ``num_users`` if memory bandwidth were the only limit."""
        step_bytes = self.weight_bytes + num_users * self.position_bytes * self.num_positions
        return num_users * bytes_per_s / step_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that ``bench serve`` prints."""

    preset: str
    through: str
    device: str
    figures: tuple[Figures, ...]
    peak_bytes: int
    matmul_flops_per_s: float
    memory_bytes_per_s: float
    decode_cost: DecodeCost

    def share_of_ceiling(self, row: Figures) -> float:
        """Decoding speed as a share of the memory bandwidth limit."""
        return row.decode_tokens_per_s / self.decode_cost.ceiling(row.num_users, self.memory_bytes_per_s)


def build_questions(number: int, seed: int = 0, *, prompt_tokens: int = 0) -> list[BenchQuestion]:
    """Distinct questions, each with its own image: a PNG of smooth noise.

    Args:
        prompt_tokens: add words until a prompt has about this many tokens. Without them it has ``SHORT_PROMPT``.
    """
    from PIL import Image

    random = np.random.default_rng(seed)
    questions = []
    for index in range(number):
        finding, place = random.choice(_FINDINGS), random.choice(_PLACES)
        coarse = random.integers(0, 255, (28, 28, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(buffer, "PNG")
        text = f"In case {index} of {number}, is there {finding} on the {place} side? Say what you see and why."
        more = random.choice(_PLACES, max(0, prompt_tokens - SHORT_PROMPT))
        questions.append(BenchQuestion(" ".join((text, *more)), buffer.getvalue()))
    return questions


def parse_users(text: str) -> tuple[int, ...]:
    """The numbers of users of a ``--users`` option.

    Raises:
        UserError: it is not a list of positive numbers.
    """
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(f"--users {text!r} must be whole numbers with commas between them, for example 1,16")
    return numbers


def summarize(num_users: int, timings: list[Timing], wall_s: float) -> Figures:
    """The figures of one measurement that took ``wall_s`` seconds."""
    first = np.asarray([timing.first_token_s for timing in timings])
    each = np.asarray([timing.per_token_s for timing in timings])
    return Figures(
        num_users,
        sum(timing.num_tokens for timing in timings) / wall_s,
        len(timings) / wall_s,
        *np.percentile(first, (50, 95)).tolist(),
        *np.percentile(each, (50, 95)).tolist(),
    )
