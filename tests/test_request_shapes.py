"""Request bodies of the wrong shape: one sentence names the field, what was sent and what to send."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from helpers.serving import data_url, generation, png, tiny_worker, user_message
from pydantic import BaseModel, ValidationError

from babydoctor.serve.api.openai.chat import ChatRequest
from babydoctor.serve.api.openai.completions import CompletionRequest
from babydoctor.serve.api.openai.responses import ResponsesRequest
from babydoctor.serve.api.protocol import GenerateRequest, RegisterRequest
from babydoctor.serve.api.shape_errors import shape_error

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


def with_content(content: Any) -> dict[str, Any]:
    return CHAT | {"messages": [{"role": "user", "content": content}]}


def text_and_image(**image: Any) -> dict[str, Any]:
    return with_content([{"type": "text", "text": "a"}, {"type": "image_url", **image}])


CASES: list[tuple[type[BaseModel], Any, str]] = [
    (ChatRequest, [], "The body must be an object, not a list."),
    (ChatRequest, {"model": "tiny"}, "messages is missing; add it to the request."),
    (ChatRequest, CHAT | {"messages": []}, "messages has 0 items; send at least 1."),
    (ChatRequest, CHAT | {"messages": ["a"]}, "messages[0] must be an object, not a string."),
    (ChatRequest, with_content(5), "messages[0].content must be a string or a list, not 5."),
    (ChatRequest, with_content(["a"]), "messages[0].content[0] must be an object, not a string."),
    (ChatRequest, with_content([{"type": "text", "text": 5}]), "messages[0].content[0].text must be a string, not 5."),
    (
        ChatRequest,
        with_content([{"type": "audio"}]),
        'messages[0].content[0].type must be "text" or "image_url", not the string "audio".',
    ),
    (ChatRequest, with_content([{}]), "messages[0].content[0].type is missing; add it to the request."),
    (ChatRequest, with_content("a\0"), "messages[0].content must not contain the NUL character."),
    (
        ChatRequest,
        text_and_image(image_url="data:image/png;base64,AAAA"),
        'messages[0].content[1].image_url must be an object, {"url": "data:image/png;base64,..."}, not a string.',
    ),
    (ChatRequest, text_and_image(), "messages[0].content[1].image_url is missing; add it to the request."),
    (
        ChatRequest,
        text_and_image(image_url={"url": 4}),
        "messages[0].content[1].image_url.url must be a string, not 4.",
    ),
    (
        ChatRequest,
        CHAT | {"messages": [{"role": "tool"}]},
        'messages[0].role must be "system", "developer", "user" or "assistant", not the string "tool".',
    ),
    (ChatRequest, CHAT | {"temperature": "hot"}, 'temperature must be a number, not the string "hot".'),
    (ChatRequest, CHAT | {"temperature": 3}, "temperature must be at most 2, not 3."),
    (ChatRequest, CHAT | {"temperature": float("nan")}, "temperature must be a finite number, not NaN."),
    (ChatRequest, CHAT | {"stop": ["a", None]}, "stop[1] must be a string, not null."),
    (ChatRequest, CHAT | {"logit_bias": {"a": 1}}, 'Each key of logit_bias must be an integer, not the string "a".'),
    (ChatRequest, CHAT | {"logit_bias": {"1": 101}}, "logit_bias.1 must be at most 100, not 101."),
    (ChatRequest, CHAT | {"model": "a" * 600}, "model has 600 characters; send at most 512."),
    (CompletionRequest, {"model": "a", "prompt": {}}, "prompt must be a string or a list, not an object."),
    (ResponsesRequest, {"model": "a", "input": 5}, "input must be a string or a list, not 5."),
    (
        ResponsesRequest,
        {"model": "a", "input": [{"role": "user", "content": [{"type": "zz", "text": "a"}]}]},
        'input[0].content[0].type must be "input_text", "output_text" or "input_image", not the string "zz".',
    ),
    (ResponsesRequest, {"model": "a", "input": CHAT["messages"] * 256}, "input has 256 items; send at most 255."),
    (GenerateRequest, {"prompt": 5}, "prompt must be a string, not 5."),
    (GenerateRequest, {"prompt": "a", "seed": 2**63}, f"seed must be less than {2**63}, not {2**63}."),
    (
        GenerateRequest,
        {"prompt": "a", "logprobs": "x"},
        'logprobs must be true or false or an integer, not the string "x".',
    ),
    (
        RegisterRequest,
        {"worker_name": "a", "worker_status": {"model_names": [""]}},
        "worker_status.model_names[0] has 0 characters; send at least 1.",
    ),
]


@pytest.mark.parametrize(("model", "body", "sentence"), CASES, ids=[case[2][:40] for case in CASES])
def test_a_wrong_shape_gets_one_sentence(model: type[BaseModel], body: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = shape_error(errors, body)
    assert error.message == sentence
    assert error.param is None or error.param in sentence


def test_long_text_of_the_client_is_cut() -> None:
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate({"prompt": "a", "temperature": "x" * 10_000, "y" * 10_000: 1})
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    assert len(shape_error(errors, {"prompt": "a", "temperature": "x" * 10_000}).message) < 120


def post(path: str, body: bytes, headers: dict[str, str] | None = None) -> requests.Response:
    return requests.post(tiny_worker().url + path, data=body, headers=headers or {}, timeout=60)


def test_a_missing_content_type_is_json_for_llava() -> None:
    """``requests`` sends no Content-Type with bytes, as some of LLaVA's clients do."""
    body = json.dumps(generation(max_new_tokens=2)).encode()
    response = post("/worker_generate_stream", body)
    assert response.status_code == 200 and b'"error_code": 0' in response.content
    assert post("/count_token", body).json()["count"] > 0
    refused = post("/count_token", body, {"Content-Type": "text/plain"})
    sentence = "The body must be JSON with the header Content-Type: application/json."
    assert refused.status_code == 422 and refused.json()["error"]["message"] == sentence
    refused = post("/v1/completions", json.dumps({"model": "tiny", "prompt": "a"}).encode())
    assert refused.status_code == 400 and refused.json()["error"]["message"] == sentence


@pytest.mark.parametrize(
    ("body", "code", "part"),
    [
        (b"", "bad_request", "The body is empty; send a JSON object."),
        (b"null", "bad_request", "The body must be an object, not null."),
        (b'{"model": "tiny", "prompt": "\xff"}', "bad_json", "it is not UTF-8"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "bad_json", "too many digits"),
        (rb'{"prompt": "a\ud800"}', "bad_request", "prompt must be valid Unicode"),
        (rb'{"prompt": "a", "json_schema": {"a": [1, "\udfff"]}}', "bad_request", "json_schema.a[1] must be valid"),
        (rb'{"prompt": "a", "json_schema": {"\ud800": 1}}', "bad_request", "json_schema must be valid Unicode"),
        (rb'{"\ud800": 1, "prompt": "a"}', "bad_request", "The body must be valid Unicode"),
    ],
)
def test_a_body_that_is_not_json_text_is_refused(body: bytes, code: str, part: str) -> None:
    for path in ("/worker_generate", "/v1/completions"):
        response = post(path, body, {"Content-Type": "application/json"})
        error = response.json()["error"]
        assert response.status_code in (400, 422) and error["code"] == code, error
        assert part in error["message"], error


def test_a_whole_surrogate_pair_is_text() -> None:
    body = rb'{"model": "tiny", "prompt": "\ud83e\ude7b", "max_new_tokens": 1}'
    assert post("/worker_generate", body, {"Content-Type": "application/json"}).status_code == 200


def test_the_worker_answers_a_plain_string_as_image_url_with_one_sentence() -> None:
    message = user_message("a", png())
    message["content"][1]["image_url"] = data_url(png())
    response = requests.post(
        tiny_worker().url + "/v1/chat/completions", json={"model": "tiny", "messages": [message]}, timeout=60
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages[0].content[1].image_url" and error["message"].endswith("not a string.")


@pytest.mark.parametrize(
    ("roles", "continues"), [("uu", False), ("a", False), ("", True), ("u", True), ("ua", False), ("aa", True)]
)
def test_turns_that_do_not_alternate_are_refused(roles: str, continues: bool) -> None:
    """``turns`` may come from any client of the LLaVA protocol, not only from our controller."""
    turns = [{"role": {"u": "user", "a": "assistant"}[role], "text": "a"} for role in roles]
    body = generation(max_new_tokens=1, turns=turns, continues=continues)
    response = requests.post(tiny_worker().url + "/worker_generate", json=body, timeout=60)
    if not roles:
        assert response.status_code == 200  # the prompt alone counts
        return
    error = response.json()["error"]
    assert response.status_code == 422 and (error["code"], error["param"]) == ("bad_messages", "turns"), error


def test_a_long_unknown_field_name_is_cut() -> None:
    for name, shown in (
        ("tools_x", "tools_x"),
        ("x" * 3000, "x" * 40),
        ("", 'the field ""'),
        ("a b", 'the field "a b"'),
    ):
        response = requests.post(
            tiny_worker().url + "/v1/completions", json={"model": "tiny", "prompt": "a", name: [1]}, timeout=60
        )
        message = f"{shown} is not supported by this server; leave it out."
        assert response.status_code == 400 and response.json()["error"]["message"] == message
