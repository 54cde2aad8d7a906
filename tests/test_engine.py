"""The engine, compared with transformers' ``generate``, and its guarantees for each request."""

# Fixtures are imported by name.
# ruff: noqa: F401, F811
from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from helpers.engine_models import (
    CONTEXT,
    PATCHES,
    build_model,
    build_request,
    reference,
    settings,
    tokenizer,
    tokens_of,
    train_in_4_bit,
)

from babydoctor.config import LoraConfig
from babydoctor.engine.engine import Engine
from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.engine.request import (
    Delta,
    EngineClosedError,
    Finished,
    GenerationRequest,
    ImageInput,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestFailedError,
)
from babydoctor.engine.settings import EngineSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.lora import add_lora
from babydoctor.model.nf4 import Quantization, quantize_linear
from babydoctor.schema import UserError


@pytest.fixture(scope="module")
def model() -> BabyDoctor:
    return build_model()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("num_kv_heads", [8, 2])
def test_a_batch_gives_the_same_tokens_as_each_request_alone_and_as_generate(tokenizer, num_kv_heads, pack):
    model = build_model(num_kv_heads)
    requests = [build_request(seed, num_images=seed % 3, length=5 + 9 * (seed % 7)) for seed in range(11)]
    expected = [reference(model, request) for request in requests]
    with Engine(model, tokenizer, settings(pack_weights=pack)) as engine:
        together = [engine.submit(request) for request in requests]
        assert [tokens_of(handle) for handle in together] == expected
    for request, tokens in zip(requests[:3], expected, strict=False):
        with Engine(model, tokenizer, settings(max_running=1, pack_weights=pack)) as alone:
            assert tokens_of(alone.submit(request)) == tokens


def test_requests_longer_than_a_slot_are_refused_or_cut(model, tokenizer):
    with Engine(model, tokenizer, settings()) as engine:
        with pytest.raises(PromptTooLongError, match="room for 159"):
            engine.submit(build_request(0, length=CONTEXT))
        finished = engine.submit(build_request(0, length=CONTEXT - 20, max_new_tokens=99)).result(60)
        assert finished.finish_reason == "length"
        assert finished.usage.total_tokens == CONTEXT


def test_reusing_an_equal_prefix_does_not_change_the_answer(model, tokenizer):
    first = build_request(1)
    answer = reference(model, first)
    longer = np.concatenate([first.input_ids, np.asarray(answer[:-1]), [7, 8, 9]]).astype(np.int32)
    turn = GenerationRequest(
        longer,
        np.concatenate([first.image_mask, np.zeros(len(longer) - len(first.input_ids), bool)]),
        first.images,
        max_new_tokens=12,
        ignore_eos=True,
    )
    other_image = GenerationRequest(
        first.input_ids, first.image_mask, build_request(2).images, max_new_tokens=12, ignore_eos=True
    )
    with Engine(model, tokenizer, settings()) as engine:
        assert engine.submit(first).result(60).usage.cached_tokens == 0
        again = engine.submit(first)
        assert tokens_of(again) == answer
        assert again.finished.usage.cached_tokens == len(first.input_ids) - 1
        follow_up = engine.submit(turn)
        assert tokens_of(follow_up) == reference(model, turn)
        assert follow_up.finished.usage.cached_tokens == len(longer) - 3
        # With the same text and another image, reuse ends where the image begins.
        other = engine.submit(other_image)
        assert tokens_of(other) == reference(model, other_image)
        assert other.finished.usage.cached_tokens == 5
        assert engine.stats().image_cache_misses == 2


def test_sampling_depends_on_the_seed_and_not_on_the_batch(model, tokenizer):
    def ask(seed: int | None) -> GenerationRequest:
        return build_request(3, temperature=1.3, top_p=0.8, seed=seed)

    with Engine(model, tokenizer, settings()) as engine:
        alone = tokens_of(engine.submit(ask(5)))
        crowd = [engine.submit(build_request(number, temperature=0.7)) for number in range(6)]
        in_crowd = engine.submit(ask(5))
        assert tokens_of(in_crowd) == alone
        assert tokens_of(engine.submit(ask(6))) != alone
        assert tokens_of(engine.submit(ask(None))) != tokens_of(engine.submit(ask(None)))
        for handle in crowd:
            handle.result(60)


def test_text_and_stop_strings(model, tokenizer):
    request = build_request(4, max_new_tokens=40)
    tokens = reference(model, request)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    stop = next(text[i : i + 3] for i in range(8, 30) if "\ufffd" not in text[i : i + 3] and text[i : i + 3].isascii())
    with Engine(model, tokenizer, settings()) as engine:
        events = list(engine.submit(request))
        assert "".join(event.text for event in events if isinstance(event, Delta)) == text == events[-1].text
        options = {"max_new_tokens": 40, "stop": ("never", stop)}
        events = list(engine.submit(build_request(4, **options)))
    assert events[-1].finish_reason == "stop" and events[-1].stop_string == stop
    shown = "".join(event.text for event in events if isinstance(event, Delta))
    assert shown == text[: text.index(stop)] == events[-1].text


def test_the_end_token_ends_an_answer(tokenizer):
    model = build_model(seed=3)
    probe = build_request(5, max_new_tokens=30)
    tokens = reference(model, probe)
    model.language_model.generation_config.eos_token_id = tokens[9]
    with Engine(model, tokenizer, settings()) as engine:
        handle = engine.submit(build_request(5, max_new_tokens=30, ignore_eos=False))
        assert tokens_of(handle) == tokens[: tokens.index(tokens[9]) + 1]
        assert handle.finished.finish_reason == "stop" and handle.finished.stop_string is None


@torch.no_grad()
def test_logprobs_are_those_of_the_model(model, tokenizer):
    request = build_request(6, num_images=0, max_new_tokens=5, logprobs=3)
    with Engine(model, tokenizer, settings()) as engine:
        events = [event for event in engine.submit(request) if isinstance(event, Delta)]
    given = [item for event in events for item in event.logprobs]
    ids = np.concatenate([request.input_ids, [item.token_id for item in given]]).astype(np.int64)
    logits = model.language_model(torch.from_numpy(ids)[None]).logits[0, len(request.input_ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    for row, item in zip(expected, given, strict=True):
        assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-4)
        assert [token for token, _, _ in item.top] == row.topk(3).indices.tolist()
        assert item.top[0][0] == item.token_id and item.top[0][2] == pytest.approx(item.logprob)


def test_cancel_ends_a_request_at_the_next_step_and_frees_its_slot(model, tokenizer):
    with Engine(model, tokenizer, settings(max_running=1)) as engine:
        handle = engine.submit(build_request(7, max_new_tokens=120))
        waiting = engine.submit(build_request(8, max_new_tokens=3))
        never_started = engine.submit(build_request(9))
        never_started.cancel()
        for event in handle:
            assert isinstance(event, Delta)
            handle.cancel()
            break
        finished = handle.wait(60)
        assert finished.finish_reason == "cancelled" and finished.usage.completion_tokens < 100
        assert waiting.result(60).finish_reason == "length"
        assert never_started.result(60).finish_reason == "cancelled"
        stats = engine.stats()
        assert stats.running == stats.queued == 0 and engine.kv_cache.num_free == 1
        assert stats.finished == {"cancelled": 2, "length": 1}


def test_a_deadline_ends_running_and_waiting_requests(model, tokenizer):
    with Engine(model, tokenizer, settings(max_running=1)) as engine:
        late = engine.submit(build_request(7, max_new_tokens=120, timeout_s=0.0))
        assert late.result(60).finish_reason == "deadline"
        assert engine.submit(build_request(7, timeout_s=60)).result(60).finish_reason == "length"


def break_image() -> np.ndarray:
    raise OSError("the file is gone")


def test_an_exception_ends_only_the_request_that_caused_it(model, tokenizer, monkeypatch):
    good = build_request(10)
    expected = reference(model, good)
    broken = build_request(11)
    broken = GenerationRequest(broken.input_ids, broken.image_mask, (ImageInput("gone", break_image),))
    not_a_number = build_request(12)
    not_a_number = GenerationRequest(
        not_a_number.input_ids,
        not_a_number.image_mask,
        (ImageInput("nan", np.full((3, 28, 28), np.nan, np.float32)),),
    )
    poison = build_request(13, num_images=0)
    engine = Engine(model, tokenizer, settings())
    forward = engine.decoder.forward
    marked = model.language_model.model.embed_tokens(torch.from_numpy(poison.input_ids.astype(np.int64)))[-1]

    def fail_on_poison(rows, chunks):
        if any(torch.equal(chunk.embeds[-1], marked) for chunk in chunks):
            raise RuntimeError("a kernel failed")
        return forward(rows, chunks)

    monkeypatch.setattr(engine.decoder, "forward", fail_on_poison)
    with engine:
        handles = [engine.submit(request) for request in (broken, good, not_a_number, poison)]
        with pytest.raises(RequestFailedError, match="the file is gone"):
            handles[0].result(60)
        with pytest.raises(InvalidRequestError, match="finite"):
            handles[2].result(60)
        with pytest.raises(RequestFailedError, match="a kernel failed"):
            handles[3].result(60)
        assert tokens_of(handles[1]) == expected
        assert tokens_of(engine.submit(good)) == expected
        assert engine.kv_cache.num_free == 4


def test_damaged_output_is_reported_and_its_slot_zeroed(model, tokenizer):
    request = build_request(14)
    with Engine(model, tokenizer, settings(max_running=1, cached_slots=0)) as engine:
        huge = GenerationRequest(
            request.input_ids,
            request.image_mask,
            (ImageInput("huge", np.full((3, 28, 28), 3e38, np.float32)),),
        )
        with pytest.raises(RequestFailedError, match="not a number"):
            engine.submit(huge).result(60)
        assert tokens_of(engine.submit(request)) == reference(model, request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros(0, np.int32)}, "input_ids"),
        ({"input_ids": np.full(42, 257, np.int32)}, "0 .. 256"),
        ({"image_mask": np.zeros(42, bool)}, "image_mask marks 0"),
        ({"image_mask": np.zeros(3, bool)}, "shape"),
        ({"images": ()}, "0 images"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"logprobs": 99}, "logprobs=99"),
        ({"stop": ("",)}, "empty"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_invalid_requests_are_refused(model, tokenizer, change, message):
    base = build_request(15)
    fields = {name: getattr(base, name) for name in GenerationRequest.__slots__} | change
    engine = Engine(model, tokenizer, settings())
    with pytest.raises(InvalidRequestError, match=message):
        engine.submit(GenerationRequest(**fields))


def test_a_full_queue_and_a_draining_engine_refuse(model, tokenizer):
    with Engine(model, tokenizer, settings(max_running=1, max_queue=1)) as engine:
        handles = [engine.submit(build_request(seed, max_new_tokens=100)) for seed in range(2)]
        with pytest.raises(QueueFullError):
            for seed in range(2, 9):
                handles.append(engine.submit(build_request(seed, max_new_tokens=100)))
        assert not engine.drain(timeout_s=0.01)
        with pytest.raises(EngineClosedError):
            engine.submit(build_request(9))
        assert engine.drain(60)
        assert all(handle.finished.finish_reason == "length" for handle in handles)
        assert not engine.healthy


def test_closing_cancels_running_requests(model, tokenizer):
    engine = Engine(model, tokenizer, settings(max_running=2)).start()
    handles = [engine.submit(build_request(seed, max_new_tokens=110)) for seed in range(4)]
    engine.close()
    engine.close()
    assert all(handle.wait(10).finish_reason in ("cancelled", "length") for handle in handles)


def test_the_reader_of_several_requests_is_woken_once_per_step(model, tokenizer):
    seen: list[object] = []
    seen_at_wake: list[int] = []
    engine = Engine(model, tokenizer, settings(max_running=4)).start()
    handles = [engine.submit(build_request(seed, max_new_tokens=12)) for seed in range(4)]

    def wake() -> None:
        seen_at_wake.append(len(seen))

    for handle in handles:
        handle.add_listener(seen.append, after_step=wake)
    assert engine.drain(60)
    num_steps = engine.stats().steps
    engine.close()
    assert sum(isinstance(event, Finished) for event in seen) == 4
    assert seen_at_wake[-1] == len(seen) > num_steps
    assert len(seen_at_wake) <= num_steps + len(handles)


def test_an_error_in_a_listener_does_not_stop_the_engine(model, tokenizer):
    request = build_request(16)
    expected = reference(model, request)

    def complain(event: object) -> None:
        raise RuntimeError("nobody reads")

    with Engine(model, tokenizer, settings()) as engine:
        broken = engine.submit(build_request(17))
        broken.add_listener(lambda event: None)
        deaf = engine.submit(build_request(18, max_new_tokens=4))
        with contextlib.suppress(RuntimeError):
            deaf.add_listener(complain)
        assert tokens_of(engine.submit(request)) == expected
        assert deaf.wait(60) and broken.wait(60)


def test_adapters_and_4_bit_layers_run_without_merging(tokenizer):
    model = train_in_4_bit(build_model(seed=4), "model.layers.0.")
    requests = [build_request(seed, length=8 + 7 * seed) for seed in range(3)]
    expected = [reference(model, request) for request in requests]
    with Engine(model, tokenizer, settings()) as engine:
        assert [tokens_of(handle) for handle in [engine.submit(request) for request in requests]] == expected


@torch.no_grad()
def test_wrong_settings_are_named(model, tokenizer):
    with pytest.raises(UserError, match="max_running=0"):
        EngineSettings(max_running=0)
    with pytest.raises(UserError, match="max_context=9999"):
        Engine(model, tokenizer, EngineSettings(max_context=9999))
    with pytest.raises(UserError, match="kv_budget_bytes=1000"):
        Engine(model, tokenizer, EngineSettings(kv_budget_bytes=1000))


def test_memory_is_allocated_once_and_within_the_budget(model, tokenizer):
    budget = 2_000_000
    with Engine(model, tokenizer, settings(kv_budget_bytes=budget, max_running=64)) as engine:
        assert engine.kv_cache.num_bytes <= budget < engine.kv_cache.num_bytes * 1.1
        places = [memory.data_ptr() for memory in (*engine.kv_cache.keys, *engine.kv_cache.values)]
        handles = [engine.submit(build_request(seed)) for seed in range(8)]
        assert all(handle.result(60).finish_reason == "length" for handle in handles)
        assert places == [memory.data_ptr() for memory in (*engine.kv_cache.keys, *engine.kv_cache.values)]
        stats = engine.stats()
        assert stats.generated_tokens == 8 * 24


def test_graphs_need_a_gpu(model, tokenizer):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cuda_graphs"):
            Engine(model, tokenizer, settings(cuda_graphs=True))


@pytest.mark.parametrize("own", [False, True])
def test_the_models_storage_is_unchanged_unless_the_engine_owns_it(tokenizer, own):
    model, request = build_model(), build_request(1)
    expected = reference(model, request)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with Engine(model, tokenizer, settings(pack_weights=False, own_weights=own)) as engine:
        assert tokens_of(engine.submit(request)) == expected
    assert ([parameter.data_ptr() for parameter in model.parameters()] == places) == (not own)
