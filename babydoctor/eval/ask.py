"""Answers from a model: questions go through the engine in batches, predictions are written as they come."""

from __future__ import annotations

import json
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.conversation import get_template, render_prompt
from babydoctor.data.tokens import encode
from babydoctor.engine.engine import Engine
from babydoctor.engine.request import (
    Delta,
    EngineError,
    GenerationHandle,
    GenerationRequest,
    ImageInput,
    TokenLogprob,
)
from babydoctor.engine.settings import build_settings
from babydoctor.eval.calibration import yes_no_confidence
from babydoctor.eval.conditions import ConditionedImages, pixel_key
from babydoctor.eval.metrics import parse_yes_no
from babydoctor.eval.tasks import Question
from babydoctor.schema import IMAGE_TOKEN, Example, Turn, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from babydoctor.model.babydoctor import BabyDoctor
    from babydoctor.model.run_dir import Manifest

_TOP_LOGPROBS = 10
_MAX_NEW_TOKENS = {"caption": 160, "vqa": 48}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How answers are drawn; greedy by default. ``max_new_tokens`` 0 takes 160 for captions and 48 otherwise."""

    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer. ``confidence`` is that of a yes/no answer, or None; ``finish_reason`` is the engine's."""

    id: str
    answer: str
    confidence: float | None = None
    finish_reason: str = ""
    num_tokens: int = 0


class Asker:
    """A model, ready to be asked. Use as a context manager: it owns an engine.

    The KV cache is as long as the longest of the questions needs, with its answer.
    """

    def __init__(
        self,
        model: BabyDoctor,
        tokenizer: PreTrainedTokenizerBase,
        manifest: Manifest,
        questions: Sequence[Question],
        config: GenerationConfig | None = None,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        """``questions``: those that will be asked. ``engine``: settings of the engine that replace the defaults."""
        self.config = config or GenerationConfig()
        self.template = get_template(manifest.template)
        self.image_settings = manifest.image
        self._tokenizer = tokenizer
        self._num_patches = model.num_patches
        size = self.config.batch_size
        longest = max(
            (len(self._encode(question)) + self._max_new_tokens(question) for question in questions), default=1
        )
        context = min(longest, model.language_model.config.max_position_embeddings)
        settings = build_settings(engine or {}, max_running=size, max_queue=4 * size, max_context=context)
        self.engine = Engine(model, tokenizer, settings)

    def __enter__(self) -> Asker:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def ask(self, questions: Sequence[Question], images: ConditionedImages) -> Iterator[Prediction]:
        """Yield the answers in the order of the questions. A question that fails has an empty answer and says why."""
        waiting: deque[tuple[Question, GenerationHandle | EngineError]] = deque()
        # Twice the batch: the engine never waits for an image to be read.
        for question in questions:
            waiting.append((question, self._submit(question, images)))
            if len(waiting) >= 2 * self.config.batch_size:
                yield self._collect(*waiting.popleft())
        while waiting:
            yield self._collect(*waiting.popleft())

    def _encode(self, question: Question) -> Example:
        text = question.prompt if question.image is None else f"{IMAGE_TOKEN}\n{question.prompt}"
        return encode(render_prompt([Turn("user", text)], self.template), self._tokenizer, self._num_patches)

    def _max_new_tokens(self, question: Question) -> int:
        return self.config.max_new_tokens or _MAX_NEW_TOKENS["caption" if question.kind == "caption" else "vqa"]

    def _submit(self, question: Question, images: ConditionedImages) -> GenerationHandle | EngineError:
        pixels = images.pixels(question)
        prompt = self._encode(question)
        room = self.engine.max_context - len(prompt)
        try:
            return self.engine.submit(
                GenerationRequest(
                    input_ids=prompt.input_ids,
                    image_mask=prompt.image_mask,
                    images=() if pixels is None else (ImageInput(pixel_key(pixels), pixels),),
                    # A prompt without room for an answer is the engine's to refuse.
                    max_new_tokens=max(1, min(self._max_new_tokens(question), room)),
                    temperature=self.config.temperature,
                    top_p=self.config.top_p,
                    # By the question and not by its place: a resumed evaluation draws what it would have drawn.
                    seed=self.config.seed + zlib.crc32(question.id.encode()),
                    stop=(self.template.stop,),
                    logprobs=_TOP_LOGPROBS if question.yes_no_reference else None,
                    request_id=question.id,
                )
            )
        except EngineError as error:
            return error

    def _collect(self, question: Question, handle: GenerationHandle | EngineError) -> Prediction:
        if isinstance(handle, EngineError):
            return Prediction(question.id, "", None, f"error: {handle}")
        logprobs: list[TokenLogprob] = []
        for event in handle:
            if isinstance(event, Delta):
                logprobs += event.logprobs
        finished = handle.result()
        answer = finished.text.strip()
        confidence = answer_confidence(answer, logprobs)
        return Prediction(question.id, answer, confidence, finished.finish_reason, finished.usage.completion_tokens)


def answer_confidence(answer: str, logprobs: Sequence[TokenLogprob]) -> float | None:
    """Confidence of a yes/no answer: p(given) / (p(yes) + p(no)) at the first token that is a word.

    Where that token does not even begin the word, it is the probability of the whole answer.
    """
    if parse_yes_no(answer) is None or not logprobs:
        return None
    first = next((token for token in logprobs if token.text.strip()), logprobs[0])
    alternatives = {text: math.exp(logprob) for _, text, logprob in first.top}
    alternatives.setdefault(first.text, math.exp(first.logprob))
    confidence = yes_no_confidence(alternatives, answer)
    return confidence if confidence is not None else min(1.0, math.exp(sum(token.logprob for token in logprobs)))


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file, ours or somebody else's: JSONL or a JSON list of objects.

    Keys: ``id`` (or ``question_id``, ``qid``) and ``answer`` (or ``text``, ``prediction``, ``pred``). The last line
    may be cut off, as an interruption leaves it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such predictions file")
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
    lines = text.splitlines()
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
    """The predictions of a file in the order of the questions; all questions must have one."""
    by_id = {prediction.id: prediction for prediction in read_predictions(path)}
    missing = [question.id for question in questions if question.id not in by_id]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(questions)} questions have no prediction, first id {missing[0]!r}; "
            f"the file has ids like {next(iter(by_id), None)!r}"
        )
    return [by_id[question.id] for question in questions]


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Write each prediction as it comes, one JSON line, and hand it on."""
    with path.open("a", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
            file.flush()
            yield prediction


def unanswered(path: Path, questions: Sequence[Question]) -> list[Question]:
    """The questions that an interrupted evaluation has still to ask; a line cut off is removed from the file."""
    if not path.is_file():
        return list(questions)
    done = read_predictions(path)
    if not path.read_bytes().endswith(b"\n"):
        path.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in done), encoding="utf-8")
    answered = {prediction.id for prediction in done}
    return [question for question in questions if question.id not in answered]
