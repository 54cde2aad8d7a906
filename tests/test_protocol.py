"""Bodies, messages and errors of the LLaVA protocol."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from babydoctor.engine.request import TokenLogprob, Usage
from babydoctor.serve.api.errors import ApiError, overflow_error
from babydoctor.serve.api.llava_stream import OVERFLOW_NOTICE, LlavaReader, LlavaWriter
from babydoctor.serve.api.protocol import GenerateRequest, RegisterRequest, WorkerStatus
from babydoctor.serve.api.streaming import AnswerDelta


def read_all(data: bytes, **options: str) -> list[AnswerDelta]:
    return list(LlavaReader(**options).feed(data))


def test_a_message_is_json_and_one_nul_byte():
    data = LlavaWriter("").encode(AnswerDelta("scan \0 [INST]é"))
    assert data.count(b"\0") == 1 and data.endswith(b"\0")
    assert json.loads(data[:-1]) == {"text": "scan \0 [INST]é", "error_code": 0}


def test_the_text_of_messages_is_cumulative_and_begins_with_the_prompt():
    writer = LlavaWriter("Q: ")
    data = b"".join(writer.encode(delta) for delta in (AnswerDelta("a"), None, AnswerDelta("b")))
    assert [json.loads(message)["text"] for message in data.split(b"\0")[:-1]] == ["Q: a", "Q: a", "Q: ab"]
    assert [delta.text for delta in read_all(data, front="Q: ")] == ["a", "", "b"]


def test_a_delta_survives_the_protocol_with_all_its_fields():
    logprob = TokenLogprob(-1, "a", -0.5, ((-1, "b", -1.0),))
    delta = AnswerDelta("a", "stop", Usage(3, 2), (1, 2), (logprob,))
    assert read_all(LlavaWriter("x", token_ids=True).encode(delta), front="x") == [delta]
    assert "token_ids" not in json.loads(LlavaWriter("").encode(delta)[:-1])


def test_an_error_follows_the_text_that_came_before_it():
    error = ApiError("worker_lost", "Lost.")
    text, last = read_all(LlavaWriter("x").encode(AnswerDelta("ab", error=error)), front="x")
    assert text.text == "ab" and text.error is None
    assert last.error is not None and (last.error.code, last.error.message) == ("worker_lost", "Lost.")


def test_a_prompt_that_is_too_long_is_llavas_notice_and_our_error():
    data = LlavaWriter("x").encode(AnswerDelta(error=overflow_error()))
    message = json.loads(data[:-1])
    assert message["text"] == f"x{OVERFLOW_NOTICE}" and message["error_code"] == 0
    (delta,) = read_all(data, front="x")
    assert delta.error is not None and delta.error.code == "context_length_exceeded"


@pytest.mark.parametrize("portion", [1, 2, 3, 7, 1000])
def test_messages_are_read_whole_from_any_chunks(portion: int):
    deltas = [AnswerDelta("répoñse" * n) for n in range(5)]
    writer = LlavaWriter("")
    data = b"".join(map(writer.encode, deltas)) + b'{"text": "cut'
    reader = LlavaReader()
    found = [d for start in range(0, len(data), portion) for d in reader.feed(data[start : start + portion])]
    assert found == deltas
    assert reader.pending == len(b'{"text": "cut')


def test_text_from_a_lost_worker_is_not_repeated():
    writer = LlavaWriter("Q")
    data = b"".join(writer.encode(AnswerDelta(text)) for text in ("one", " two", " three"))
    assert "".join(delta.text for delta in read_all(data, front="Q", so_far="one tw")) == "o three"


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"text": 1}', b"no json", b"\xff"])
def test_invalid_messages_are_refused(data: bytes):
    with pytest.raises(ValueError):
        read_all(data + b"\0")


def test_messages_of_llava_and_fastchat_are_read():
    assert read_all(b'{"text": "a", "error_code": 0}\0') == [AnswerDelta("a")]
    fastchat = b'{"text": "a", "error_code": 0, "usage": {}, "finish_reason": null, "logprobs": {"tokens": []}}\0'
    assert read_all(fastchat) == [AnswerDelta("a")]
    (lost,) = read_all(b'{"text": "NETWORK ERROR", "error_code": 3}\0')
    assert lost.error is not None and lost.error.code == "worker_lost"


def test_defaults_equal_llavas():
    request = GenerateRequest.model_validate({"prompt": "x", "images": None, "stop": None, "top_k": 50, "unknown": 1})
    assert (request.temperature, request.top_p, request.max_new_tokens, request.echo) == (1.0, 1.0, 256, True)
    assert not request.greedy and GenerateRequest(prompt="x", temperature=0.001).greedy
    assert (
        GenerateRequest.model_validate({"prompt": "x", "temperature": "0.2", "max_new_tokens": "7"}).max_new_tokens == 7
    )


def test_stop_is_a_string_or_a_list():
    assert GenerateRequest(prompt="x", stop="</s>").stops == ("</s>",)
    assert GenerateRequest(prompt="x", stop=["a", "", "b", "a"]).stops == ("a", "b")
    assert GenerateRequest(prompt="x", stop="").stops == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "half \ud800 pair"),
        ("prompt", "a\0b"),
        ("prompt", None),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.5),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("images", "not a list"),
        ("images", ["x"] * 65),
        ("resume_ids", [-1]),
    ],
)
def test_bad_values_name_their_field(field: str, value: object):
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate({"prompt": "x"} | {field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize("status", [{"model_names": []}, {"model_names": ["a"], "speed": 0}, {"model_names": [""]}])
def test_an_invalid_worker_status_is_refused(status: dict):
    with pytest.raises(ValidationError):
        WorkerStatus.model_validate(status)


def test_llavas_registration_is_read():
    body = {"worker_name": "http://localhost:21002", "check_heart_beat": True, "worker_status": None}
    assert RegisterRequest.model_validate(body).worker_status is None


def test_one_error_body_fits_all_clients():
    body = ApiError("queue_full", "Busy.", retry_after_s=3).body()
    assert body["error"]["type"] == "rate_limit_error" and body["error"]["code"] == "queue_full"
    assert body["text"] == "Busy." and body["error_code"] == 1
