"""Features of an OpenAI-compatible server, with the ``openai`` client: n, penalties, JSON, other APIs."""

from __future__ import annotations

import json
import math

import openai
import pydantic
import pytest
import requests
from helpers.openai_client import client
from helpers.serving import generation, llava_answer, png, tiny_run, tiny_worker
from helpers.serving import user_message as user

__all__ = ["client"]
MESSAGES = [{"role": "system", "content": ""}, user("Which modality is this?", png())]
OPTIONS = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}


def answer(client: openai.OpenAI, **fields) -> str:
    extra = {name: fields.pop(name) for name in ("top_k", "min_p", "repetition_penalty") if name in fields}
    whole = client.chat.completions.create(**OPTIONS | fields, extra_body=extra)
    return whole.choices[0].message.content


def token_id(text: str) -> int:
    vocabulary = json.loads((tiny_run().parent / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    return vocabulary[text]


def test_several_answers_have_different_seeds(client: openai.OpenAI):
    options = OPTIONS | {"temperature": 1.0, "seed": 7, "n": 3}
    whole = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert whole.usage.completion_tokens == 72
    streamed = {0: "", 1: "", 2: ""}
    last = None
    for last in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in last.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts and last.usage == whole.usage
    assert answer(client, temperature=1.0, seed=8) == texts[1]


def test_sampling_fields_have_their_effect(client: openai.OpenAI):
    plain = answer(client)
    assert answer(client, temperature=1.5, top_k=1, seed=1) == plain
    assert answer(client, temperature=1.5, min_p=1.0, seed=1) == plain
    assert answer(client, temperature=1.5, top_k=-1, min_p=0.0, seed=1) != plain
    # Tokens of the tiny model are characters: a strong penalty leaves no character twice.
    once = answer(client, presence_penalty=2.0, frequency_penalty=2.0)
    assert len(set(once)) > len(set(plain)) or len(set(plain)) == len(plain)
    assert answer(client, repetition_penalty=10.0) != plain or len(set(plain)) == len(plain)
    first = plain[0]
    banned = client.chat.completions.create(**OPTIONS, logit_bias={str(token_id(first)): -100})
    assert not banned.choices[0].message.content.startswith(first)
    forced = client.chat.completions.create(**OPTIONS | {"max_tokens": 4}, logit_bias={str(token_id("Q")): 100})
    assert forced.choices[0].message.content == "QQQQ"


def test_the_llava_api_accepts_the_same_fields():
    body = generation(png(), max_new_tokens=4, logit_bias={str(token_id("Q")): 100})
    assert llava_answer(tiny_worker().url, body) == "QQQQ"


class Finding(pydantic.BaseModel):
    present: bool
    side: str


SCHEMA = {
    "type": "object",
    "properties": {
        "modality": {"enum": ["CT", "MR", "radiograph"]},
        "normal": {"type": "boolean"},
    },
    "required": ["modality", "normal"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_answers_follow_the_json_schema(client: openai.OpenAI, temperature: float):
    form = {"type": "json_schema", "json_schema": {"name": "scan", "schema": SCHEMA, "strict": True}}
    whole = client.chat.completions.create(
        **OPTIONS | {"max_tokens": 200, "temperature": temperature, "seed": 3}, response_format=form
    )
    found = json.loads(whole.choices[0].message.content)
    assert found.keys() == {"modality", "normal"} and found["modality"] in ("CT", "MR", "radiograph")
    assert whole.choices[0].finish_reason == "stop"


def test_json_object_gives_an_object_and_parse_a_model(client: openai.OpenAI):
    whole = client.chat.completions.create(**OPTIONS, response_format={"type": "json_object"})
    assert whole.choices[0].message.content.startswith("{")
    # A bias towards the closing quote ends the string, which a random model would write forever.
    parsed = client.chat.completions.parse(
        **OPTIONS | {"max_tokens": 200}, response_format=Finding, logit_bias={str(token_id('"')): 100}
    )
    assert isinstance(parsed.choices[0].message.parsed, Finding)


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError, match="JSON schema") as caught:
        client.chat.completions.create(**OPTIONS, response_format=form)
    assert caught.value.body["code"] == "bad_schema"


def test_completions_continue_a_text(client: openai.OpenAI):
    whole = client.completions.create(model="tiny", prompt=["The scan", "A scan"], n=2, max_tokens=8, temperature=0)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text == whole.choices[1].text
    one = {"model": "tiny", "prompt": "The scan", "max_tokens": 8, "temperature": 0}
    echoed = client.completions.create(**one, echo=True, logprobs=2)
    assert echoed.choices[0].text == "The scan" + whole.choices[0].text
    scores = echoed.choices[0].logprobs
    assert len(scores.tokens) == 8 and len(scores.top_logprobs[0]) == 2 and scores.text_offset[0] == len("The scan")
    assert math.isclose(max(scores.top_logprobs[0].values()), scores.token_logprobs[0], abs_tol=1e-4)
    parts = [part.choices[0].text for part in client.completions.create(**one, stream=True)]
    assert "".join(parts) == whole.choices[0].text
    again = client.completions.create(**one | {"prompt": echoed.choices[0].text[:12], "max_tokens": 4})
    assert echoed.choices[0].text.startswith(echoed.choices[0].text[:12] + again.choices[0].text[:1])


def test_a_last_assistant_message_is_continued(client: openai.OpenAI):
    whole = answer(client)
    begun = {"role": "assistant", "content": whole[:6]}
    rest = client.chat.completions.create(**OPTIONS | {"messages": [*MESSAGES, begun]})
    assert rest.choices[0].message.content and rest.usage.prompt_tokens > 0
    body = generation(png(), max_new_tokens=24)
    body["prompt"] = body["prompt"].replace("[INST] ", "[INST] ", 1) + f" {whole[:6]}"
    assert rest.choices[0].message.content == llava_answer(tiny_worker().url, body | {"continues": True})


def test_the_responses_api_works_without_state(client: openai.OpenAI):
    parts = [
        {"type": "input_text", "text": "Which modality is this?"},
        {"type": "input_image", "detail": "auto", "image_url": MESSAGES[1]["content"][1]["image_url"]["url"]},
    ]
    # An empty system prompt: the chat messages above have one too.
    conversation = [{"role": "system", "content": ""}, {"role": "user", "content": parts}]
    options = {"model": "tiny", "input": conversation, "temperature": 0, "max_output_tokens": 24}
    whole = client.responses.create(**options)
    assert whole.output_text == answer(client)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 24
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    form = {"format": {"type": "json_schema", "name": "scan", "schema": SCHEMA}}
    found = client.responses.create(**options | {"max_output_tokens": 100}, text=form)
    assert found.status == "completed" and json.loads(found.output_text).keys() == {"modality", "normal"}


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"tools": [{"type": "web_search_preview"}]},
        {"background": True},
        {"reasoning": {"effort": "high"}},
    ],
)
def test_unsupported_fields_of_responses_are_named(client: openai.OpenAI, fields: dict):
    with pytest.raises(openai.BadRequestError, match=next(iter(fields))) as caught:
        client.responses.create(model="tiny", input="x", **fields)
    assert caught.value.body["code"] == "unsupported"


def test_an_unknown_model_is_named_together_with_those_that_exist(client: openai.OpenAI):
    for call in (
        lambda: client.models.retrieve("other"),
        lambda: client.chat.completions.create(**OPTIONS | {"model": "other"}),
        lambda: client.completions.create(model="other", prompt="x"),
        lambda: client.responses.create(model="other", input="x"),
    ):
        with pytest.raises(openai.NotFoundError, match=r"'other'.*tiny"):
            call()


def test_health_and_bad_json():
    url = tiny_worker().url
    assert requests.get(f"{url}/health", timeout=60).json() == {"status": "ready"}
    for path, status in (("/v1/chat/completions", 400), ("/worker_generate", 422)):
        reply = requests.post(
            url + path, data='{\n  "model": "tiny",\n  oops\n}', headers={"Content-Type": "application/json"}, timeout=5
        )
        error = reply.json()["error"]
        assert reply.status_code == status and error["code"] == "bad_json"
        assert "line 3, column 3" in error["message"], error


def test_the_examples_in_the_openapi_document_work():
    url = tiny_worker().url
    document = requests.get(f"{url}/openapi.json", timeout=60).json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operation in document["paths"].items():
        content = operation.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if content is None or "$ref" not in content["schema"]:
            continue
        schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        for example in schema.get("examples", ()):
            reply = requests.post(url + path, json=example | {"model": "tiny"}, timeout=30)
            assert reply.status_code == 200, (path, reply.text)
