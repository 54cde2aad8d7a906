"""OpenAI's API: the ``openai`` client unchanged, on worker and controller."""

from __future__ import annotations

import asyncio
import base64
import http.server
import math
import threading
from collections.abc import Iterator

import openai
import pytest
from helpers.openai_client import client
from helpers.serving import PROMPT, generation, llava_answer, png, tiny_worker
from helpers.serving import user_message as user

from babydoctor.conversation import get_template
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.openai.chat import ChatRequest, ChatWriter, to_generate
from babydoctor.serve.api.protocol import GenerateRequest
from babydoctor.serve.api.remote_image import fetch_image, is_public
from babydoctor.serve.api.streaming import AnswerDelta
from babydoctor.serve.client import AskError, Client
from babydoctor.serve.settings import RemoteImages
from babydoctor.templates import LLAVA_SYSTEM

__all__ = ["client"]
TEMPLATE = get_template("llava_llama_2")


async def no_fetch(url: str) -> bytes:
    raise AssertionError("nothing is fetched")


def convert(messages: list[dict], **fields) -> GenerateRequest:
    request = ChatRequest.model_validate({"model": "tiny", "messages": messages} | fields)
    (generate,) = asyncio.run(to_generate(request, TEMPLATE, no_fetch))
    return generate


# Messages become the prompt that the stages trained on.


def test_messages_are_rendered_by_the_template_with_the_image_first():
    request = convert([user("What is it?", png())])
    assert request.prompt == f"[INST] <<SYS>>\n{LLAVA_SYSTEM}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]"
    assert request.images == [base64.b64encode(png()).decode()] and request.stops == ("</s>",)


def test_system_messages_replace_the_system_prompt():
    system = {"role": "system", "content": "Be terse."}
    assert convert([system, user("x")]).prompt == "[INST] <<SYS>>\nBe terse.\n<</SYS>>\n\nx [/INST]"
    assert convert([{"role": "developer", "content": ""}, user("x")]).prompt == "[INST] x [/INST]"


def test_a_conversation_keeps_its_turns_and_its_one_image():
    messages = [user("a", png()), {"role": "assistant", "content": "b"}, user("c"), user("d")]
    assert convert(messages).prompt.endswith("<image>\na [/INST] b </s><s>[INST] c\nd [/INST]")


def test_missing_fields_get_the_protocols_defaults():
    request = convert(
        [user("x")], temperature=None, max_completion_tokens=9, seed=-1, stop=["a"], logprobs=True, top_logprobs=2
    )
    assert (request.temperature, request.max_new_tokens, request.seed) == (1.0, 9, 2**63 - 1)
    assert request.stops == ("a", "</s>") and request.logprobs == 3


@pytest.mark.parametrize(
    ("messages", "fields", "says"),
    [
        ([user("x", png(), png())], {}, "2 images"),
        ([user("x", png()), {"role": "assistant", "content": "y"}, user("z", png())], {}, "2 images"),
        ([{"role": "assistant", "content": "x"}], {}, "begins with the user"),
        ([user("x"), {"role": "assistant", "content": "y"}], {"continue_final_message": False}, "end with the user"),
        ([user("x"), {"role": "system", "content": "late"}], {}, "system message"),
        ([user("x <image>")], {}, "<image>"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png"}}]}], {}, "comma"),
        ([user("x")], {"n": 9}, "from 1 to 8"),
        ([user("x")], {"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ([user("x")], {"tools": [{}]}, "tools"),
        ([user("x")], {"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ([user("x")], {"top_logprobs": 2}, "logprobs: true"),
    ],
)
def test_unsupported_fields_are_refused_by_name(messages: list[dict], fields: dict, says: str):
    with pytest.raises(ApiError, match=says) as caught:
        convert(messages, **fields)
    assert caught.value.status == 422


def test_events_contain_only_new_text():
    request = ChatRequest.model_validate({"model": "m", "messages": [user("x")], "stream": True})
    writer = ChatWriter(request, "id")
    first, second = writer.event(AnswerDelta("ab")), writer.event(AnswerDelta("c", "stop"))
    assert b'"content": "ab"' in first and b'"content": "c"' in second and b'"finish_reason": "stop"' in second
    assert writer.event(None).startswith(b":")


# The openai client.


MESSAGES = [{"role": "system", "content": ""}, user("Which modality is this?", png())]


def test_the_client_gets_the_same_answer_as_over_the_llava_api(client: openai.OpenAI):
    expected = llava_answer(tiny_worker().url, generation(png(), max_new_tokens=40))
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=40, temperature=0)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 40
    events = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == expected
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].usage == whole.usage and not events[-1].choices
    assert [e.choices[0].finish_reason for e in events if e.choices and e.choices[0].finish_reason] == ["length"]


def test_logprobs_and_stop(client: openai.OpenAI):
    options = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == 12 and "".join(token.token for token in content) == whole.choices[0].message.content
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob, abs_tol=1e-4)
    streamed = client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True)
    again = [token for e in streamed if e.choices[0].logprobs for token in e.choices[0].logprobs.content]
    assert [token.token for token in again] == [token.token for token in content]
    stop = whole.choices[0].message.content[5:7]
    stopped = client.chat.completions.create(**options, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == whole.choices[0].message.content.partition(stop)[0]


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_raise_the_clients_own_exceptions(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="2 images"):
        client.chat.completions.create(model="tiny", messages=[user("x", png(), png(1))])
    with pytest.raises(openai.BadRequestError, match="off on this server"):
        url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [url]}])
    with pytest.raises(openai.BadRequestError, match="not a PNG"):
        client.chat.completions.create(model="tiny", messages=[user("x", b"no image")], stream=True)


def test_our_client_uses_both_apis():
    with Client(tiny_worker().url) as client:
        assert client.models() == ["tiny"]
        question = PROMPT.partition("\n")[2].removesuffix(" [/INST]")
        assert client.ask_openai("tiny", question, png()) == client.ask_llava("tiny", question, png())
        with pytest.raises(AskError, match="not a PNG"):
            client.ask_llava("tiny", question, b"no image")


# Images by URL.


PRIVATE = """127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fe80::1%eth0
fc00::1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: ff02::1"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses_are_not_public(address: str):
    assert not is_public(address)


def test_public_addresses_are_public():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1")


@pytest.fixture(scope="module")
def image_host() -> Iterator[str]:
    """A host on this machine that serves an image, redirects, and an endless response."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/image.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(png())
            elif self.path == "/huge":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(bytes(200_000))
            else:
                self.send_response(302)
                self.send_header(
                    "Location", {"/away": "http://192.0.2.1/x", "/round": "/round"}.get(self.path, "/image.png")
                )
                self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}"
        server.shutdown()


def fetch(url: str, *hosts: str, allow: bool = True) -> bytes:
    settings = RemoteImages(hosts=hosts, max_bytes=100_000, timeout_s=5)
    return asyncio.run(fetch_image(url, settings, (lambda address: True) if allow else is_public))


def test_an_image_is_fetched_from_an_allowed_host_through_redirects(image_host: str):
    assert fetch(f"http://{image_host}/image.png", image_host) == png()
    assert fetch(f"http://{image_host}/elsewhere", image_host) == png()


@pytest.mark.parametrize(
    ("path", "hosts", "allow", "says"),
    [
        ("/image.png", (), True, "off on this server"),
        ("/image.png", ("example.org",), True, "may not read images from that host"),
        ("/image.png", ("localhost",), True, "may not read images from that host"),
        ("/image.png", None, False, "not on the public internet"),
        ("/away", None, True, "may not read images from that host"),
        ("/round", None, True, "redirects more than"),
        ("/huge", None, True, "larger than"),
    ],
)
def test_images_by_url_are_refused(image_host: str, path: str, hosts: tuple | None, allow: bool, says: str):
    with pytest.raises(ApiError, match=says):
        fetch(f"http://{image_host}{path}", *((image_host,) if hosts is None else hosts), allow=allow)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/x", "http://u:p@a/x", "http://a:x/", "gopher://a", "x"])
def test_other_kinds_of_urls_are_refused(url: str):
    with pytest.raises(ApiError):
        fetch(url, "a")
