"""Ask a model the questions of a task, and read and write the predictions."""

from __future__ import annotations

import json
import math
import zlib
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.engine.request import TokenLogprob
from babydoctor.eval.conditions import ConditionedImages
from babydoctor.eval.intervals import NUM_RESAMPLES
from babydoctor.eval.metrics import parse_yes_no, yes_no_confidence
from babydoctor.eval.tasks import Question
from babydoctor.files import split_lines, write_text
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.ranks import SharedWork
from babydoctor.schema import UserError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from babydoctor.model.babydoctor import BabyDoctor
    from babydoctor.model.run_dir import Manifest

TOP_LOGPROBS = 10
MAX_NEW_TOKENS_CAPTION = 160
MAX_NEW_TOKENS_VQA = 48


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How answers are generated.

    Attributes:
        max_new_tokens: longest answer; 0: 160 tokens for captions, 48 otherwise.
        temperature: 0: greedy.
        batch_size: questions answered at the same time.
        template: conversation template; None: the run's.
    """

    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    template: str | None = None

    def longest(self, question: Question) -> int:
        """Most tokens of the answer to a question."""
        return self.max_new_tokens or (MAX_NEW_TOKENS_CAPTION if question.kind == "caption" else MAX_NEW_TOKENS_VQA)

    def seed_of(self, question: Question) -> int:
        """Seed from the question's id, not its position, so that a resumed evaluation draws the same answers."""
        return self.seed + zlib.crc32(question.id.encode())


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """How a task is asked and scored. ``images_as`` names image conditions, see ``conditions.py``."""

    images_as: tuple[str, ...] = ("right", "shuffled", "blank", "noise")
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0
    caption_metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer to a question.

    ``confidence`` is the confidence of a yes/no answer, or None. ``finish_reason`` is the engine's, or starts with
    "error" if the question could not be asked; the answer is then empty.
    """

    id: str
    answer: str
    confidence: float | None = None
    finish_reason: str = ""
    num_tokens: int = 0


def build_inference(
    model: BabyDoctor,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    questions: Sequence[Question],
    config: GenerationConfig,
    engine: Mapping[str, Any] | None = None,
) -> Inference:
    """Build the inference for these questions. The KV cache is as long as the longest question and answer need."""
    return Inference.for_queries(
        model,
        tokenizer,
        manifest,
        (_query(question, None, config) for question in questions),
        template=config.template,
        batch_size=config.batch_size,
        engine=engine,
    )


def ask(
    inference: Inference,
    questions: Sequence[Question],
    images: ConditionedImages,
    config: GenerationConfig,
    known: dict[Hashable, Prediction] | None = None,
) -> Iterator[Prediction]:
    """Yield the predictions in the order of the questions. Images are loaded as the engine needs them.

    Args:
        known: greedy answers of this model, by question and image. A repeated question about the same image gets the
            answer of the first time, also under another condition: if blank, all images are the same. New answers are
            added.
    """
    known = {} if known is None else known
    asked: deque[tuple[Question, Hashable]] = deque()
    submitted: set[Hashable] = set()

    def queries() -> Iterator[Query]:
        for question in questions:
            key = _key(question, images, config)
            asked.append((question, key))
            if key not in known and key not in submitted:
                submitted.add(key)
                yield _query(question, images.pixels(question), config)

    def repeated() -> Iterator[Prediction]:
        while asked and asked[0][1] in known:
            question, key = asked.popleft()
            yield replace(known[key], id=question.id)

    for answer in inference.answers(queries()):
        yield from repeated()
        question, key = asked.popleft()
        confidence = answer_confidence(answer.text, answer.logprobs)
        known[key] = Prediction(question.id, answer.text, confidence, answer.finish_reason, answer.num_tokens)
        yield known[key]
    yield from repeated()


def _key(question: Question, images: ConditionedImages, config: GenerationConfig) -> Hashable:
    """What decides about a greedy answer. A sampled answer also depends on the seed, which is made from the id."""
    has_confidence = bool(question.yes_no_reference)
    key = (question.prompt, *images.name(question), config.longest(question), has_confidence)
    return key if config.temperature == 0 else (*key, question.id)


def _query(question: Question, pixels: np.ndarray | None, config: GenerationConfig) -> Query:
    return Query(
        turns=[user_turn(question.prompt, has_image=question.image is not None)],
        pixels=pixels,
        max_new_tokens=config.longest(question),
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed_of(question),
        logprobs=TOP_LOGPROBS if question.yes_no_reference else None,
        id=question.id,
    )


def answer_confidence(answer: str, logprobs: Sequence[TokenLogprob]) -> float | None:
    """Confidence of a yes/no answer: p(given) / (p(yes) + p(no)) at the first token that is not blank.

    If that token is not a prefix of "yes" or "no", the confidence is the probability of the whole answer.
    """
    if parse_yes_no(answer) is None or not logprobs:
        return None
    first = next((token for token in logprobs if token.text.strip()), logprobs[0])
    alternatives = {text: math.exp(logprob) for _, text, logprob in first.top}
    alternatives.setdefault(first.text, math.exp(first.logprob))
    confidence = yes_no_confidence(alternatives, answer)
    return confidence if confidence is not None else min(1.0, math.exp(sum(token.logprob for token in logprobs)))


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file of predictions, from this or another program: JSONL, or a JSON list of objects.

    Keys: ``id`` (or ``question_id``, ``qid``) and ``answer`` (or ``text``, ``prediction``, ``pred``). An incomplete
    last line, left by an interruption, is ignored.

    Raises:
        UserError: the file does not exist, is not valid JSON, or a prediction lacks a key.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such predictions file; check --predictions")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
    else:
        rows = list(_json_lines(path, text))
    return [_prediction(path, number, row) for number, row in enumerate(rows)]


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    lines = split_lines(text)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) - 1 and not text.endswith("\n"):
                return
            raise UserError(f"{path}:{number + 1}: not valid JSON ({error})") from error


def _prediction(path: Path, number: int, row: Any) -> Prediction:
    def first_of(*keys: str) -> Any:
        return next((row[key] for key in keys if isinstance(row, dict) and key in row), None)

    identity, answer = first_of("id", "question_id", "qid"), first_of("answer", "text", "prediction", "pred")
    if identity is None or answer is None:
        raise UserError(f'{path}#{number}: a prediction needs id and answer, for example {{"id": 7, "answer": "no"}}')
    confidence = row.get("confidence")
    return Prediction(
        str(identity),
        str(answer),
        float(confidence) if confidence is not None else None,
        str(row.get("finish_reason", "")),
        int(row.get("num_tokens", 0)),
    )


def match_predictions(path: Path, questions: Sequence[Question]) -> list[Prediction]:
    """The predictions of a file, in the order of the questions.

    Raises:
        UserError: a question has no prediction.
    """
    by_id = {prediction.id: prediction for prediction in read_predictions(path)}
    missing = [question.id for question in questions if question.id not in by_id]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(questions)} questions have no prediction, first id {missing[0]!r}; "
            f"the file has ids like {next(iter(by_id), None)!r}"
        )
    return [by_id[question.id] for question in questions]


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Append each prediction to a JSONL file and pass it on."""
    with path.open("a", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
            file.flush()
            yield prediction


def predictions_file(out: Path, condition: str, ranks: SharedWork = SharedWork()) -> Path:
    """Where a rank writes its predictions. One process writes the whole file, several ranks write parts of it.

    Without ``ranks`` it is the whole file.
    """
    part = "" if ranks.size == 1 else f".rank-{ranks.rank}"
    return out / f"predictions-{condition}{part}.jsonl"


def merge_parts(out: Path, condition: str, questions: Sequence[Question]) -> None:
    """Move what ranks have written, now or before an interruption, into the whole file, in the order of the questions.

    To be called while no rank writes.
    """
    parts = sorted(out.glob(f"predictions-{condition}.rank-*.jsonl"))
    if not parts:
        return
    whole = predictions_file(out, condition)
    found = {
        prediction.id: prediction for path in (whole, *parts) if path.is_file() for prediction in read_predictions(path)
    }
    ordered = [found[question.id] for question in questions if question.id in found]
    write_text(whole, "".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in ordered))
    for path in parts:
        path.unlink()


def unanswered(path: Path, questions: Sequence[Question]) -> list[Question]:
    """The questions that an interrupted evaluation has not asked yet. Removes an incomplete last line from the file."""
    if not path.is_file():
        return list(questions)
    done = read_predictions(path)
    if not path.read_bytes().endswith(b"\n"):
        path.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in done), encoding="utf-8")
    answered = {prediction.id for prediction in done}
    return [question for question in questions if question.id not in answered]
