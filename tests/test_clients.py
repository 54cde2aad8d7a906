"""Existing client programs, unchanged, against a controller with a worker. Run: ``pytest -m clients``.

The packages are in the extra ``clients``. They may be in a separate environment, whose interpreter is given by
``BABYDOCTOR_CLIENTS_PYTHON``. Tests of missing packages are skipped. The serving guide has a table of the results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from helpers.serving import (
    Server,
    bare_base64,
    free_port,
    llava_answer,
    png,
    start_controller,
    start_worker,
    stop_all,
    tiny_run,
    wait_until,
)

from babydoctor.conversation import TEMPLATES, get_template, prompt_text, render_prompt
from babydoctor.schema import Turn

pytestmark = pytest.mark.clients

PYTHON = os.environ.get("BABYDOCTOR_CLIENTS_PYTHON", sys.executable)

ALIAS = "llava-llama-2-tiny"


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    controller = start_controller(folder / "controller.log")
    servers = [controller]
    try:
        wait_until(lambda: requests.get(f"{controller.url}/healthz", timeout=10).ok, 180, "the controller")
        settings = (f"worker.controller={controller.url}", f"worker.aliases=[{ALIAS}]")
        servers.append(start_worker(tiny_run(), folder / "worker.log", *settings))
        wait_until(lambda: models(controller), 120, "the worker's registration")
        yield controller
    finally:
        stop_all(servers)


def models(controller: Server) -> list[str]:
    return requests.post(f"{controller.url}/list_models", timeout=5).json()["models"]


def environment() -> dict[str, str]:
    """The environment without this checkout's path, so that a client imports from its own environment."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def need(*packages: str) -> None:
    code = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(p) is None for p in {packages}))"
    if subprocess.run([PYTHON, "-c", code], timeout=120).returncode:
        pytest.skip(f"{' and '.join(packages)} not installed: pip install 'babydoctor[clients]'")


def run_client(code: str, *arguments: str, cwd: Path, timeout_s: float = 300) -> str:
    """Run a program with the clients' interpreter and return its last line of output."""
    done = subprocess.run(
        [PYTHON, "-c", code, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def expected(controller: Server, question: str, num_tokens: int) -> str:
    """The answer to a question without an image, by a plain HTTP request."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": num_tokens,
        "temperature": 0,
    }
    reply = requests.post(f"{controller.url}/v1/chat/completions", json=body, timeout=60)
    return reply.json()["choices"][0]["message"]["content"]


INSPECT = """
import asyncio, sys
from inspect_ai.model import GenerateConfig, get_model
config = GenerateConfig(max_tokens=16, temperature=0)
model = get_model("openai/tiny", base_url=sys.argv[1], api_key="none", responses_api=True, config=config)
print(repr(asyncio.run(model.generate("Which modality is this?")).completion))
"""


def test_inspect_ai_uses_the_responses_api(controller: Server, tmp_path: Path):
    need("inspect_ai")
    answer = run_client(INSPECT, f"{controller.url}/v1", cwd=tmp_path)
    assert answer == repr(expected(controller, "Which modality is this?", 16))


LITELLM = """
import sys, litellm
reply = litellm.completion(
    model="openai/tiny", api_base=sys.argv[1], api_key="none", max_tokens=16, temperature=0, n=2,
    messages=[{"role": "user", "content": "Which modality is this?"}],
)
assert len(reply.choices) == 2
print(repr(reply.choices[1].message.content))
"""


def test_litellm(controller: Server, tmp_path: Path):
    need("litellm")
    answer = run_client(LITELLM, f"{controller.url}/v1", cwd=tmp_path)
    assert answer == repr(expected(controller, "Which modality is this?", 16))


LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="tiny", base_url=sys.argv[1], api_key="none", max_tokens=16, temperature=0)
print(repr(chat.invoke("Which modality is this?").content))
"""


def test_langchain(controller: Server, tmp_path: Path):
    need("langchain_openai", "uuid_utils")
    answer = run_client(LANGCHAIN, f"{controller.url}/v1", cwd=tmp_path)
    assert answer == repr(expected(controller, "Which modality is this?", 16))


def test_guidellm_runs_a_benchmark(controller: Server, tmp_path: Path):
    need("guidellm")
    command = [
        *("run", "--backend", f"kind=openai_http,target={controller.url},model=tiny"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--tokenizer", f"kind=huggingface_auto,model={tiny_run().parent / 'base'}"),
        *("--output", "kind=json,path=report.json"),
    ]
    program = str(Path(PYTHON).parent / "guidellm")
    done = subprocess.run(
        [program, *command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 3 and totals["errored"] == 0, totals


def test_fastchats_openai_server_uses_our_worker(controller: Server, tmp_path: Path):
    need("fastchat", "tiktoken", "shortuuid", "aiohttp")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "fastchat.serve.openai_api_server", "--controller-address", controller.url, "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([PYTHON, *command], cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    try:
        wait_until(lambda: requests.get(f"{url}/v1/models", timeout=10).ok, 180, "FastChat's server")
        turns = ["Which modality is this?", "A scan.", "Is it normal?"]
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        body = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0}
        reply = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        ours = requests.post(f"{controller.url}/v1/chat/completions", json=body, timeout=120).json()
        assert reply["choices"][0]["message"]["content"].strip() == ours["choices"][0]["message"]["content"].strip()
        assert reply["usage"]["prompt_tokens"] == ours["usage"]["prompt_tokens"]
        body = {"model": "tiny", "prompt": "The scan", "max_tokens": 8, "temperature": 0}
        assert requests.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
    finally:
        process.terminate()
        process.wait(20)


def fastchat_prompt(conv: dict, messages: list[str]) -> str:
    """``Conversation.get_prompt`` of FastChat 0.2.36 for the three styles that our templates need."""
    system = conv["system_template"].format(system_message=conv["system_message"])
    seps = [conv["sep"], conv["sep2"]]
    if conv["sep_style"] == 2:  # ADD_COLON_TWO
        text = system + seps[0]
        for index, message in enumerate([*messages, None]):
            role = conv["roles"][index % 2]
            text += f"{role}: {message}{seps[index % 2]}" if message else f"{role}:"
        return text
    if conv["sep_style"] == 4:  # NO_COLON_SINGLE
        text = system
        for index, message in enumerate([*messages, None]):
            text += conv["roles"][index % 2] + (f"{message}{seps[0]}" if message else "")
        return text
    assert conv["sep_style"] == 7  # LLAMA2
    text = system if conv["system_message"] else "[INST] "
    for index, message in enumerate([*messages, None]):
        tag = conv["roles"][index % 2]
        if not message:
            text += tag
        else:
            text += f"{message} " if index == 0 else f"{tag} {message}{seps[index % 2]}"
    return text


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.keeps_user_text])
def test_fastchat_renders_our_templates_exactly(name: str):
    from babydoctor.serve.api.fastchat import conversation_fields

    template = get_template(name)
    for messages in (["a"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]):
        turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(messages)]
        expected = prompt_text(render_prompt(turns, template))
        assert fastchat_prompt(conversation_fields(template), messages) == expected


def http_bot_template(model_name: str) -> str:
    """The rule of ``http_bot`` in ``llava/serve/gradio_web_server.py``, release 1.2."""
    name = model_name.lower()
    if "llava" not in name:
        return "llama_2" if "llama-2" in name else "vicuna_v1"
    if "llama-2" in name:
        return "llava_llama_2"
    if "v1" in name:
        return "v1_mmtag" if "mmtag" in name else "llava_v1"
    return "mpt" if "mpt" in name else "llava_v0"


def test_llavas_http_bot_finds_the_template_by_alias(controller: Server):
    assert ALIAS in models(controller) and http_bot_template("tiny") != "llava_llama_2"
    template = get_template(http_bot_template(ALIAS))
    conv = requests.post(f"{controller.url}/worker_get_conv_template", json={"model": ALIAS}, timeout=10).json()["conv"]
    assert conv["name"] == template.name
    worker = requests.post(f"{controller.url}/get_worker_address", json={"model": ALIAS}, timeout=10).json()["address"]
    prompt = prompt_text(render_prompt([Turn("user", "<image>\nWhich modality is this?")], template))
    body = {
        "model": ALIAS,
        "prompt": prompt,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 16,
        "stop": template.stop,
        "images": [bare_base64(png())],
    }
    assert llava_answer(worker, body) == llava_answer(worker, body | {"model": "tiny"}) != ""
