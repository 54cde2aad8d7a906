"""The wire's bodies, chunks and errors."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import (
    Chunk,
    GenerateRequest,
    RegisterRequest,
    StreamDecoder,
    TokenLogprob,
    Usage,
    WorkerStatus,
    decode_chunk,
    encode_chunk,
)


def test_a_chunk_is_json_and_one_nul_byte():
    data = encode_chunk(Chunk("scan \0 [INST]é", 0))
    assert data.count(b"\0") == 1 and data.endswith(b"\0")
    assert json.loads(data[:-1]) == {"text": "scan \0 [INST]é", "error_code": 0}


def test_a_chunk_survives_the_wire_with_all_its_fields():
    usage = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    chunk = Chunk("a", 0, "stop", usage, (1, 2), (TokenLogprob("a", -0.5, (("b", -1.0),)),), None)
    assert decode_chunk(encode_chunk(chunk, token_ids=True)[:-1]) == chunk
    assert "token_ids" not in json.loads(encode_chunk(chunk)[:-1])


@pytest.mark.parametrize("portion", [1, 2, 3, 7, 1000])
def test_chunks_come_out_whole_whatever_the_portions(portion: int):
    chunks = [Chunk("répoñse" * n) for n in range(5)]
    data = b"".join(map(encode_chunk, chunks)) + b'{"text": "cut'
    decoder = StreamDecoder()
    found = [c for start in range(0, len(data), portion) for c in decoder.feed(data[start : start + portion])]
    assert found == chunks
    assert decoder.pending == len(b'{"text": "cut')


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"text": 1}', b"no json", b"\xff"])
def test_what_is_no_chunk_is_refused(data: bytes):
    with pytest.raises(ValueError):
        list(StreamDecoder().feed(data + b"\0"))


def test_the_originals_and_fastchats_chunks_are_read():
    assert decode_chunk(b'{"text": "a", "error_code": 0}') == Chunk("a")
    fastchat = b'{"text": "a", "error_code": 0, "usage": {}, "finish_reason": null, "logprobs": {"tokens": []}}'
    assert decode_chunk(fastchat) == Chunk("a")


def test_defaults_are_the_originals():
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
def test_a_workers_status_must_make_sense(status: dict):
    with pytest.raises(ValidationError):
        WorkerStatus.model_validate(status)


def test_the_originals_registration_is_read():
    body = {"worker_name": "http://localhost:21002", "check_heart_beat": True, "worker_status": None}
    assert RegisterRequest.model_validate(body).worker_status is None


def test_one_error_body_serves_all_clients():
    body = ApiError("queue_full", "Busy.", retry_after_s=3).body()
    assert body["error"]["type"] == "rate_limit_error" and body["error"]["code"] == "queue_full"
    assert body["text"] == "Busy." and body["error_code"] == 1
