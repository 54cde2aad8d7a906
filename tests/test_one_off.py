"""Commands that ask a few questions: a KV cache of the needed size, and engine settings on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from babydoctor.cli.main import build_app
from babydoctor.engine.engine import Engine
from babydoctor.engine.request import GenerationRequest
from babydoctor.engine.settings import EngineSettings, build_kv_cache, build_settings, parse_overrides
from babydoctor.eval.ask import GenerationConfig, ask, build_inference
from babydoctor.eval.conditions import ConditionedImages
from babydoctor.eval.tasks import Question
from babydoctor.inference import open_conversation, user_turn
from babydoctor.model.known_sizes import LLAMA_2_7B
from babydoctor.model.run_dir import Run, load_run
from babydoctor.schema import UserError

LLAMA_7B = LlamaConfig(**LLAMA_2_7B, max_position_embeddings=4096)
FLOAT32_TOKEN = 2**20
"""Bytes of a 7B model's keys and values per token in float32."""


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return load_run(tiny_run)


def cache_of_7b(**values: Any):  # type: ignore[no-untyped-def]
    """The cache of a 7B bfloat16 model on the CPU. Its pages take no memory until something is written."""
    return build_kv_cache(EngineSettings(**values), LLAMA_7B, torch.bfloat16, torch.device("cpu"))


def test_the_precision_depends_on_the_memory_needed() -> None:
    one_question = {"max_running": 1, "cached_slots": 0, "max_context": 600}
    roomy = cache_of_7b(**one_question, kv_budget_bytes=2 * 600 * FLOAT32_TOKEN)
    assert (roomy.dtype, roomy.num_slots, roomy.num_bytes) == (torch.float32, 1, 2 * 600 * FLOAT32_TOKEN)
    tight = cache_of_7b(**one_question, kv_budget_bytes=2 * 600 * FLOAT32_TOKEN - 1)
    assert (tight.dtype, tight.num_bytes) == (torch.bfloat16, 600 * FLOAT32_TOKEN)
    chosen = cache_of_7b(**one_question, kv_budget_bytes=2**40, kv_dtype="bfloat16")
    assert chosen.dtype == torch.bfloat16
    # Sixteen short requests at a time, the default of eval: halve the precision, not the number of requests.
    several = cache_of_7b(max_running=16, max_context=400, kv_budget_bytes=5 * 2**30)
    assert (several.dtype, several.max_running) == (torch.bfloat16, 16)


def test_a_cache_that_does_not_fit_names_what_to_lower() -> None:
    budget = 500 * 2**20
    with pytest.raises(UserError, match=r"4096 tokens takes 4,294,967,296 bytes in bfloat16.*to at most 500") as caught:
        cache_of_7b(max_running=1, cached_slots=0, kv_budget_bytes=budget)
    assert f"engine.kv_budget_bytes={budget}" in str(caught.value)
    fitting = cache_of_7b(max_running=1, cached_slots=0, max_context=500, kv_budget_bytes=budget)
    assert fitting.num_slots == 1
    with pytest.raises(UserError, match=r"set engine\.kv_dtype=bfloat16"):
        cache_of_7b(max_context=500, kv_dtype="float32", kv_budget_bytes=budget)


def test_too_little_free_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babydoctor.engine.settings.available_memory_bytes", lambda: 2**30)
    with pytest.raises(UserError, match=r"memory is too small.*lower engine\.max_context=4096 to at most 256"):
        cache_of_7b(max_running=1, cached_slots=0)


def test_chat_allocates_one_request(run: Run) -> None:
    chat = open_conversation(run, None, question="Is this a lung?", max_new_tokens=7)
    with chat.inference as inference:
        memory, used = (
            inference.engine.kv_cache,
            len(inference.encode([user_turn("Is this a lung?", has_image=False)])) + 7,
        )
        assert (memory.capacity, memory.num_slots) == (used, 1)
        answer = "".join(chat.ask("Is this a lung?"))
        assert [turn.text for turn in chat.turns] == ["Is this a lung?", answer.strip()]
        with pytest.raises(UserError, match=rf"raise engine\.max_context={used}"):
            list(chat.ask("And what else? " * 20))
        assert len(chat.turns) == 2
    longest = run.model.language_model.config.max_position_embeddings
    engine = open_conversation(run, None, max_new_tokens=7).inference.engine
    assert engine.kv_cache.capacity == min(run.manifest.max_length + 7, longest)
    chat = open_conversation(run, None, question="Why?", engine={"max_context": 240, "kv_dtype": "bfloat16"})
    with chat.inference as inference:
        assert (inference.engine.kv_cache.capacity, inference.engine.kv_cache.dtype) == (240, torch.bfloat16)
        assert isinstance("".join(chat.ask("Why?")), str)


def test_a_bfloat16_cache_gives_nearly_the_same_probabilities(run: Run) -> None:
    def logprobs(kv_dtype: str) -> np.ndarray:
        with Engine(run.model, run.tokenizer, EngineSettings(max_running=1, kv_dtype=kv_dtype)) as engine:
            handle = engine.submit(GenerationRequest(np.arange(3, 60), max_new_tokens=4, logprobs=5))
            events = [event for event in handle if hasattr(event, "logprobs")]
        return np.array([token.logprob for event in events for token in event.logprobs])

    exact, rounded = logprobs("float32"), logprobs("bfloat16")
    assert len(exact) > 0 and abs(exact[0] - rounded[0]) < 0.02


def test_eval_allocates_for_the_longest_question(run: Run) -> None:
    questions = [Question(f"{number}", None, "", "What is it? " * number, ("a lung",), "open") for number in (1, 9, 4)]
    config = GenerationConfig(5, batch_size=2)
    with build_inference(run.model, run.tokenizer, run.manifest, questions, config) as inference:
        prompt = inference.encode([user_turn(questions[1].prompt, has_image=False)])
        assert inference.engine.max_context == len(prompt) + 5
        images = ConditionedImages(questions, "right", run.manifest.image)
        answers = list(ask(inference, questions, images, config))
    assert [answer.id for answer in answers] == ["1", "9", "4"]
    assert not any(answer.finish_reason.startswith("error") for answer in answers)
    other = build_inference(run.model, run.tokenizer, run.manifest, questions, config, {"max_running": 3})
    assert other.engine.kv_cache.max_running == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["engine.max_contxt=5"],
            r"engine\.max_contxt is not a setting.*did you mean 'engine\.max_context'",
        ),
        (["max_context=5"], r"'max_context=5' is not a setting of this command; write engine\.key=value"),
        (["engine.max_context"], r"'engine\.max_context' is not a setting of this command"),
        (["engine.max_context=[5"], "not valid YAML"),
        (["engine.max_context=many"], r"engine\.max_context='many' must be a whole number"),
        (["engine.max_context=true"], r"engine\.max_context=True must be a whole number"),
        (["engine.compile=true"], r"engine\.compile is not a setting of the engine; the engine has cached_slots"),
        (["engine.cuda_graphs=3"], r"engine\.cuda_graphs=3 must be true or false"),
        (["engine.kv_dtype=int8"], r"engine\.kv_dtype=int8 must be one of float32, bfloat16, float16"),
        (["engine.max_running=0"], r"engine\.max_running=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_settings(parse_overrides(words))


def test_overrides_replace_a_commands_defaults() -> None:
    settings = build_settings(parse_overrides(["engine.max_running=2", "engine.max_context=null"]), max_running=1)
    assert settings == EngineSettings(max_running=2)


@pytest.mark.parametrize("words", [["What is it?", "engine.max_context=240"], ["engine.max_context=240"]], ids=str)
def test_chat_command_takes_engine_settings(tiny_run: Path, words: list[str]) -> None:
    """With a question, and in a conversation, where the setting takes the question's position."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(build_app(), ["chat", str(tiny_run), *words, "--max-new-tokens", "3"], input="Why?\n\n")
    assert result.exit_code == 0, result.exception
    wrong = CliRunner().invoke(build_app(), ["chat", str(tiny_run), *words, "engine.max_context=99999"])
    assert isinstance(wrong.exception, UserError) and "engine.max_context=99999" in str(wrong.exception)
