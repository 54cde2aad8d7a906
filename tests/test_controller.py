"""The controller with real workers, ours and LLaVA's: healthy, slow, dead and restarted."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from helpers.original_llava import continuation
from helpers.serving import (
    Server,
    free_port,
    generation,
    llava_answer,
    llava_stream,
    num_cancelled,
    png,
    queue_length,
    start_controller,
    start_worker,
    stop_all,
    tiny_run,
    tiny_worker,
    wait_ready,
    wait_until,
)

SECRET = "a-secret-that-only-workers-know"
FAST = ("controller.heart_beat_expiry_s=2",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controller")


@pytest.fixture(scope="module")
def controller(folder: Path) -> Iterator[Server]:
    """A controller that several tests share. Each test uses its own model names."""
    server = start_controller(folder / "controller.log", *FAST)
    try:
        wait_until(lambda: requests.get(f"{server.url}/healthz", timeout=2).ok, 180, "the controller")
        yield server
    finally:
        stop_all([server])


def call(server: Server, path: str, body: object = None, **kwargs) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=60, **kwargs)


def register(server: Server, url: str, *models: str, check: bool = True, **kwargs) -> requests.Response:
    status = {"model_names": list(models), "speed": 1, "queue_length": 0}
    return call(
        server,
        "/register_worker",
        {"worker_name": url, "check_heart_beat": check, "worker_status": status},
        **kwargs,
    )


def models(server: Server) -> list[str]:
    return call(server, "/list_models").json()["models"]


def original(kind: str, folder: Path, *arguments: str) -> Server:
    port = free_port()
    script = Path(__file__).parent / "helpers" / "original_llava.py"
    with (folder / f"original-{port}.log").open("wb") as file:
        process = subprocess.Popen([sys.executable, str(script), kind, str(port), *arguments], stdout=file, stderr=file)
    return Server(f"http://127.0.0.1:{port}", process, folder / f"original-{port}.log")


# Registry over HTTP.


def test_registration_listing_address_and_expiry(controller: Server):
    url = "http://127.0.0.1:9"
    assert register(controller, url, "ghost", "ghost-too").json() is None
    assert {"ghost", "ghost-too"} <= set(models(controller))
    assert call(controller, "/get_worker_address", {"model": "ghost"}).json() == {"address": url}
    assert call(controller, "/get_worker_address", {"model": "nobody"}).json() == {"address": ""}
    assert call(controller, "/receive_heart_beat", {"worker_name": url, "queue_length": 1}).json()["exist"] is True
    wait_until(lambda: "ghost" not in models(controller), 180, "expiry")
    assert call(controller, "/receive_heart_beat", {"worker_name": url, "queue_length": 1}).json()["exist"] is False


@pytest.mark.parametrize(
    "header", [{"X-Forwarded-For": "127.0.0.1"}, {"Origin": "http://evil"}, {"Host": "evil:21001"}]
)
def test_without_a_secret_only_local_programs_may_register(controller: Server, header: dict[str, str]):
    assert register(controller, "http://127.0.0.1:9", "evil", headers=header).status_code == 403


def test_without_a_status_the_controller_asks_the_worker(controller: Server):
    worker = tiny_worker()
    body = {"worker_name": worker.url, "check_heart_beat": False, "worker_status": None}
    assert call(controller, "/register_worker", body).json() is None
    assert "tiny" in models(controller)
    refused = call(controller, "/register_worker", body | {"worker_name": "http://127.0.0.1:9"})
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "worker_unreachable"


def test_a_request_without_a_worker_ends_with_code_2(controller: Server):
    chunks = list(llava_stream(controller.url, generation() | {"model": "nobody"}))
    assert [chunk["error_code"] for chunk in chunks] == [2]
    messages = [{"role": "user", "content": "x"}]
    missing = call(controller, "/v1/chat/completions", {"model": "nobody", "messages": messages})
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_an_unreachable_worker_gives_code_3_and_leaves_rotation(controller: Server):
    register(controller, f"http://127.0.0.1:{free_port()}", "absent", check=False)
    chunks = list(llava_stream(controller.url, generation() | {"model": "absent"}))
    assert [chunk["error_code"] for chunk in chunks] == [3]
    assert "absent" not in models(controller)
    (chunk,) = llava_stream(controller.url, generation() | {"model": "absent"})
    assert chunk["error_code"] == 2


def test_refreshing_does_not_empty_the_registry(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        register(controller, f"http://127.0.0.1:{silent.getsockname()[1]}", "silent", check=False)
        with ThreadPoolExecutor(4) as pool:
            rounds = [pool.submit(call, controller, "/refresh_all_workers") for _ in range(4)]
            while not all(done.done() for done in rounds):
                started = time.perf_counter()
                assert "tiny" in models(controller)
                assert time.perf_counter() - started < 1
            assert all(done.result().json() is None for done in rounds)
    assert "silent" not in models(controller)


def test_status_sums_all_workers(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    status = call(controller, "/worker_get_status").json()
    assert "tiny" in status["model_names"] and status["speed"] >= 1 and status["queue_length"] >= 0
    assert requests.get(controller.url + "/readyz", timeout=60).status_code == 200
    assert "babydoctor_workers" in requests.get(controller.url + "/metrics", timeout=60).text


# Forwarding requests.


def test_an_answer_through_the_controller_equals_the_workers(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    body = generation(png(), max_new_tokens=40)
    assert llava_answer(controller.url, body) == llava_answer(tiny_worker().url, body)
    whole = call(controller, "/worker_generate", body | {"echo": False}).json()
    assert whole["text"] == llava_answer(tiny_worker().url, body) and whole["usage"]["completion_tokens"] == 40
    assert "token_ids" not in whole


def test_attention_and_model_details_are_forwarded(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    body = generation(png()) | {"answer": "a scan"}
    reply = call(controller, "/worker_attention", body)
    assert reply.json() == call(tiny_worker(), "/worker_attention", body).json() and reply.json()["grid"] == [8, 8]
    assert call(controller, "/worker_attention", body | {"images": []}).status_code == 422
    assert call(controller, "/model_details", {"model": "tiny"}).json()["template"] == "llava_llama_2"
    assert call(controller, "/count_token", {"model": "tiny", "prompt": "x"}).json()["count"] == 2
    assert call(controller, "/worker_attention", body | {"model": "nobody"}).status_code == 404


def test_a_workers_refusal_reaches_the_client(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    refused = call(controller, "/worker_generate_stream", generation(b"no image"))
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "bad_image"
    long = generation() | {"prompt": "x" * 5000}
    (chunk,) = llava_stream(controller.url, long)
    assert chunk["error_code"] == 0 and "Exceeds max token length" in chunk["text"]


def test_a_client_that_disconnects_from_the_controller_frees_the_workers_slot(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    before = num_cancelled(tiny_worker())
    for index in range(20):
        stream = llava_stream(controller.url, generation(png(), max_new_tokens=900))
        for _ in range(index % 7 + 1):
            next(stream)
        stream.close()
    wait_until(lambda: queue_length(tiny_worker().url) == 0, 180, "the slots' return")
    assert num_cancelled(tiny_worker()) - before == 20


def test_a_full_worker_is_429_through_the_controller(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    streams = [llava_stream(controller.url, generation(max_new_tokens=900)) for _ in range(7)]
    threads = [threading.Thread(target=next, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    wait_until(lambda: queue_length(tiny_worker().url) == 7, 15, "a full queue")
    refused = call(controller, "/worker_generate_stream", generation())
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    for thread in threads:
        thread.join(20)
    for stream in streams:
        stream.close()
    wait_until(lambda: queue_length(tiny_worker().url) == 0, 180, "all slots to be free")


def test_a_worker_that_hangs_does_not_delay_others(controller: Server):
    test_without_a_status_the_controller_asks_the_worker(controller)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        register(controller, f"http://127.0.0.1:{silent.getsockname()[1]}", "hangs", check=False)
        with ThreadPoolExecutor(8) as pool:
            url, body = controller.url + "/worker_generate_stream", generation() | {"model": "hangs"}
            stuck = [pool.submit(requests.post, url, json=body, stream=True, timeout=60) for _ in range(8)]
            started = time.perf_counter()
            assert llava_answer(controller.url, generation(max_new_tokens=5))
            assert "tiny" in models(controller)
            assert time.perf_counter() - started < 3
            # Headers and keep-alives arrive although the worker is silent.
            for response in stuck:
                with response.result() as opened:
                    assert opened.status_code == 200
                    assert next(opened.iter_content(1))


# Workers that die and return.


@pytest.fixture(scope="module")
def pair(controller: Server, folder: Path) -> Iterator[list[Server]]:
    """Two workers for one model, which send heartbeats."""
    settings = (f"worker.controller={controller.url}", "worker.model_name=twin", "worker.heart_beat_s=0.5")
    servers = [start_worker(tiny_run(), folder / f"twin-{index}.log", *settings) for index in range(2)]
    try:
        for server in servers:
            wait_ready(server)
        wait_until(lambda: len(twins(controller)) == 2, 180, "two workers")
        yield servers
    finally:
        stop_all(servers)


def twins(controller: Server) -> list[dict]:
    found = requests.get(controller.url + "/workers", timeout=60).json()
    return [worker for worker in found if "twin" in worker["models"] and not worker["failed"]]


def busy_one(pair: list[Server]) -> Server:
    return next(server for server in pair if queue_length(server.url) > 0)


def revive(controller: Server, server: Server, folder: Path) -> Server:
    """Start a dead worker again on its port, and wait until it is back in rotation."""
    port = int(server.url.rpartition(":")[2])
    settings = (f"worker.controller={controller.url}", "worker.model_name=twin", "worker.heart_beat_s=0.5")
    again = wait_ready(start_worker(tiny_run(), folder / f"twin-again-{port}.log", *settings, port=port))
    wait_until(lambda: len(twins(controller)) == 2, 180, "the worker's return")
    return again


def test_requests_are_distributed_over_workers(controller: Server, pair: list[Server]):
    bodies = [generation(png(seed), max_new_tokens=1024) | {"model": "twin"} for seed in range(4)]
    streams = [llava_stream(controller.url, body) for body in bodies]
    for stream in streams:
        next(stream)
    wait_until(lambda: [queue_length(server.url) for server in pair] == [2, 2], 60, "two answers on each worker")
    for stream in streams:
        stream.close()


def test_another_worker_continues_the_answers_of_a_frozen_one(controller: Server, pair: list[Server]):
    body = generation(png(4), max_new_tokens=500) | {"model": "twin"}
    expected = llava_answer(controller.url, body)
    texts = llava_texts(controller, body)
    next(texts)
    victim = busy_one(pair)
    victim.process.send_signal(signal.SIGSTOP)
    try:
        *_, last = texts
        assert last == expected
        assert len(twins(controller)) == 1
    finally:
        victim.process.send_signal(signal.SIGCONT)
    wait_until(lambda: len(twins(controller)) == 2, 180, "the worker's return")


@pytest.mark.parametrize("api", ["llava", "openai"])
def test_kill_9_during_a_stream_is_invisible_to_the_client(
    api: str, controller: Server, pair: list[Server], folder: Path
):
    body = generation(png(3), max_new_tokens=500) | {"model": "twin"}
    expected = llava_answer(controller.url, body)
    texts = llava_texts(controller, body) if api == "llava" else openai_texts(controller, body)
    seen = [next(texts)]
    while len(seen[-1]) < 40:
        seen.append(next(texts))
    victim = busy_one(pair)
    victim.kill()
    seen += texts
    assert seen[-1] == expected
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    assert len(twins(controller)) == 1
    assert llava_answer(controller.url, body) == expected
    pair[pair.index(victim)] = revive(controller, victim, folder)


def llava_texts(controller: Server, body: dict) -> Iterator[str]:
    for chunk in llava_stream(controller.url, body):
        assert chunk["error_code"] == 0, chunk
        yield chunk["text"][len(body["prompt"]) :]


def openai_texts(controller: Server, body: dict) -> Iterator[str]:
    """The same question over OpenAI's API. The template's system prompt makes it another prompt."""
    import openai

    client = openai.OpenAI(base_url=f"{controller.url}/v1", api_key="none", max_retries=0)
    content = [
        {"type": "text", "text": "Which modality is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{body['images'][0]}"}},
    ]
    # An empty system message leaves the system prompt out, as the prompt of the LLaVA API does here.
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": content}]
    text = ""
    stream = client.chat.completions.create(model="twin", messages=messages, max_tokens=500, temperature=0, stream=True)
    for event in stream:
        text += event.choices[0].delta.content or ""
        yield text


def test_a_draining_worker_hands_over_its_answers_and_ends(controller: Server, pair: list[Server], folder: Path):
    body = generation(png(5), max_new_tokens=300) | {"model": "twin"}
    texts = llava_texts(controller, body)
    next(texts)
    victim = busy_one(pair)
    victim.process.terminate()
    wait_until(lambda: any(worker["draining"] for worker in twins(controller)), 180, "the notice")
    assert llava_answer(controller.url, generation() | {"model": "twin"})
    *_, last = texts
    assert len(last) > 250 and victim.process.wait(120) == 0


# LLaVA's own programs on the other side.


def test_llavas_own_worker_behind_our_controller(controller: Server, folder: Path):
    workers = [original("worker", folder, controller.url, "llava-v1.5", "0.02") for _ in range(2)]
    try:
        # They register before they listen.
        for server in workers:
            wait_until(lambda server=server: queue_length(server.url) == 0, 180, "the worker")
        wait_until(lambda: "llava-v1.5" in models(controller), 15, "registration")
        body = {
            "model": "llava-v1.5",
            "prompt": "USER: x ASSISTANT:",
            "temperature": 0,
            "max_new_tokens": 60,
            "stop": "</s>",
        }
        expected = "".join(continuation(body["prompt"], 60))
        assert wait_until(lambda: llava_answer(controller.url, body), 10) == expected

        texts = llava_texts(controller, body)
        seen = [next(texts) for _ in range(5)]
        busy = next(server for server in workers if queue_length(server.url) > 0)
        busy.kill()
        assert [*seen, *texts][-1] == expected

        chat = {"model": "llava-v1.5", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
        answer = call(controller, "/v1/chat/completions", chat).json()
        assert answer["choices"][0] | {"logprobs": None} == {
            "index": 0,
            "message": {"role": "assistant", "content": " the scan shows", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    finally:
        stop_all(workers)


def test_our_worker_behind_llavas_own_controller(folder: Path):
    theirs = original("controller", folder)
    ours = start_worker(
        tiny_run(), folder / "behind-original.log", f"worker.controller={theirs.url}", "worker.heart_beat_s=0.5"
    )
    try:
        wait_ready(ours)
        wait_until(lambda: call(theirs, "/list_models").json()["models"] == ["tiny"], 180, "registration")
        assert call(theirs, "/get_worker_address", {"model": "tiny"}).json() == {"address": ours.url}
        body = generation(png(), max_new_tokens=30)
        assert llava_answer(theirs.url, body) == llava_answer(ours.url, body)
        # The controller forgets its workers. Ours returns with its next heartbeat.
        theirs.kill()
        port = theirs.url.rpartition(":")[2]
        script = Path(__file__).parent / "helpers" / "original_llava.py"
        theirs.process = subprocess.Popen([sys.executable, str(script), "controller", port])
        wait_until(lambda: call(theirs, "/list_models").json()["models"] == ["tiny"], 180, "registration")
    finally:
        stop_all([ours, theirs])


# Permissions.


def test_workers_need_the_secret_and_clients_need_a_key(folder: Path):
    environment = {"BABYDOCTOR_API_KEYS": "key-of-the-ward-1", "BABYDOCTOR_REGISTRATION_SECRET": SECRET}
    trusted = tiny_worker().url
    server = start_controller(folder / "locked.log", f"controller.trusted_workers=[{trusted}]", environment=environment)
    # One token per step makes a long prompt take longer than the deadline.
    slow = ("engine.step_tokens=1", "limits.request_timeout_s=3", f"worker.controller={server.url}")
    worker = start_worker(tiny_run(), folder / "locked-worker.log", *slow, environment=environment)
    key = {"Authorization": "Bearer key-of-the-ward-1"}
    try:
        wait_until(lambda: requests.get(f"{server.url}/healthz", timeout=2).ok, 180, "the controller")
        # Without the secret nobody registers a worker, not even with a client's key, except from the trusted address.
        assert register(server, "http://127.0.0.1:9", "evil").status_code == 403
        assert register(server, "http://127.0.0.1:9", "evil", headers=key).status_code == 403
        beat = {"worker_name": "http://127.0.0.1:9", "queue_length": 0}
        assert call(server, "/receive_heart_beat", beat).status_code == 403
        assert register(server, trusted, "trusted", check=False).status_code == 200
        assert (
            register(server, "http://127.0.0.1:9", "x", headers={"Authorization": f"Bearer {SECRET}"}).status_code
            == 200
        )
        # Clients need a key.
        assert call(server, "/list_models").status_code == 401
        assert "trusted" in call(server, "/list_models", headers=key).json()["models"]
        # Controller and worker send each other the secret.
        wait_ready(worker)
        wait_until(lambda: "tiny" in call(server, "/list_models", headers=key).json()["models"], 180, "registration")
        assert llava_answer(server.url, generation(png(), max_new_tokens=4), headers=key)

        late = generation() | {"prompt": "x" * 4000}
        *_, last = llava_stream(server.url, late, headers=key)
        assert last["error_code"] == 1 and "longer than this server allows" in last["text"]
        # A different text, so that no prefix is reused.
        assert call(server, "/worker_generate", late | {"prompt": "y" * 4000}, headers=key).status_code == 504
        knows = {"Authorization": f"Bearer {SECRET}"}
        assert call(worker, "/worker_get_status", headers=knows).json()["queue_length"] == 0
        logged = server.log.read_text() + worker.log.read_text()
        assert SECRET not in logged and "key-of" not in logged and "127.0.0.1" not in logged
    finally:
        stop_all([server, worker])
