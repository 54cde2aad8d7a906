"""One worker as a real process with a real engine, for normal and for hostile clients."""

from __future__ import annotations

import io
import itertools
import json
import re
import socket
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from helpers.serving import (
    PROMPT,
    Server,
    bare_base64,
    generation,
    in_background,
    llava_answer,
    llava_stream,
    num_cancelled,
    png,
    queue_length,
    start_worker,
    stop_all,
    tiny_run,
    tiny_worker,
    wait_ready,
    wait_until,
)
from PIL import Image

LONG = 900


@pytest.fixture(scope="module")
def worker() -> Server:
    return tiny_worker()


@pytest.fixture(autouse=True)
def _no_slot_is_leaked(worker: Server):
    """After every test, all request slots must be free again."""
    yield
    wait_until(lambda: queue_length(worker.url) == 0, 15, "an empty queue")


def post(worker: Server, body: object, path: str = "/worker_generate_stream", **kwargs) -> requests.Response:
    return requests.post(worker.url + path, json=body, timeout=60, **kwargs)


# The LLaVA API.


def test_the_status_has_the_protocols_three_fields(worker: Server):
    status = post(worker, {}, "/worker_get_status").json()
    assert status["model_names"] == ["tiny"] and status["speed"] > 0 and status["queue_length"] == 0


def test_text_is_the_prompt_and_the_answer_so_far(worker: Server):
    body = generation(png())
    chunks = list(llava_stream(worker.url, body))
    texts = [chunk["text"] for chunk in chunks]
    assert len(texts) > 5 and all(chunk["error_code"] == 0 for chunk in chunks)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[0].startswith(body["prompt"]) and len(texts[-1]) > len(body["prompt"]) + 10
    assert chunks[-1]["finish_reason"] == "length"
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == 32 and usage["total_tokens"] == usage["prompt_tokens"] + 32


def test_each_chunk_ends_with_one_nul_byte(worker: Server):
    response = post(worker, generation(max_new_tokens=3))
    assert response.status_code == 200 and response.content.endswith(b"\0")
    assert [json.loads(piece)["error_code"] for piece in response.content[:-1].split(b"\0")]


def test_answers_depend_on_the_image_and_not_on_other_requests(worker: Server):
    bodies = [generation(png(seed), max_new_tokens=48) for seed in range(4)]
    alone = [llava_answer(worker.url, body) for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda body: llava_answer(worker.url, body), bodies))
    assert together == alone and len(set(alone)) == 4


def test_echo_and_a_list_of_stops(worker: Server):
    body = generation(png(), max_new_tokens=64)
    answer = llava_answer(worker.url, body)
    whole = post(worker, body | {"echo": False}, "/worker_generate").json()
    assert whole["text"] == answer and whole["finish_reason"] == "length"
    first, second = answer[20:23], answer[10:12]
    cut = min(answer.index(first), answer.index(second))
    for stop in ([first, second], [second, "never", first]):
        stopped = post(worker, body | {"stop": stop, "echo": False}, "/worker_generate").json()
        assert stopped["text"] == answer[:cut] and stopped["finish_reason"] == "stop"


def test_sampling_follows_the_seed(worker: Server):
    body = generation(png(), temperature=1.0, top_p=0.9, seed=7)
    assert llava_answer(worker.url, body) == llava_answer(worker.url, body)
    assert llava_answer(worker.url, body) != llava_answer(worker.url, body | {"seed": 8})
    assert llava_answer(worker.url, body | {"top_p": 0}) == llava_answer(worker.url, body | {"temperature": 0})


def test_more_tokens_than_the_protocol_allows_are_cut(worker: Server):
    whole = post(worker, generation(max_new_tokens=5000), "/worker_generate").json()
    assert whole["usage"]["completion_tokens"] == 1024


def test_a_prompt_that_is_too_long_gets_llavas_notice(worker: Server):
    body = generation() | {"prompt": "x" * 5000}
    (chunk,) = llava_stream(worker.url, body)
    assert chunk["error_code"] == 0 and chunk["text"].startswith(body["prompt"] + "Exceeds max token length")
    refused = post(
        worker, {"model": "tiny", "messages": [{"role": "user", "content": "x" * 5000}]}, "/v1/chat/completions"
    )
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_an_unknown_model_gives_code_2(worker: Server):
    (chunk,) = llava_stream(worker.url, generation() | {"model": "other"})
    assert chunk["error_code"] == 2
    assert llava_answer(worker.url, generation() | {"model": ""})


def test_fastchats_endpoints(worker: Server):
    count = post(worker, {"model": "tiny", "prompt": PROMPT}, "/count_token").json()
    assert count["count"] > 16 and count["error_code"] == 0
    assert post(worker, {"model": "tiny"}, "/worker_get_conv_template").json()["conv"]["name"] == "llava_llama_2"
    assert requests.post(worker.url + "/model_details", timeout=60).json()["context_length"] == 4096


def test_an_answer_continues_from_another_workers_tokens(worker: Server):
    body = generation(png(), max_new_tokens=60, token_ids=True)
    ids = [i for chunk in llava_stream(worker.url, body) for i in chunk.get("token_ids", [])]
    answer = llava_answer(worker.url, body)
    assert len(ids) == 60
    for given in (1, 17, 59, 60):
        assert llava_answer(worker.url, body | {"resume_ids": ids[:given]}) == answer
    # A stop string that spans both parts.
    stop = answer[15:19]
    assert llava_answer(worker.url, body | {"stop": stop, "resume_ids": ids[:17]}) == answer[: answer.index(stop)]


def test_an_attention_map_is_returned(worker: Server):
    answer = llava_answer(worker.url, generation(png()))
    body = {"model": "tiny", "prompt": PROMPT, "answer": answer, "images": [bare_base64(png())]}
    reply = post(worker, body, "/worker_attention").json()
    assert reply["grid"] == [8, 8] and "".join(token["text"] for token in reply["tokens"]) == answer
    assert reply["method"] == "occlusion" and reply["localization"] is None
    assert all(len(token["weights"]) == 64 and any(token["weights"]) for token in reply["tokens"])
    assert post(worker, body, "/worker_attention").json() == reply  # cached
    other = post(worker, body | {"images": [bare_base64(png(1))]}, "/worker_attention").json()
    assert other != reply
    # The map sees the prompt as the answer did: with the image first.
    reworded = "[INST] Which modality is this? <image> [/INST]"
    assert post(worker, body | {"prompt": reworded}, "/worker_attention").json() == reply
    assert post(worker, body | {"prompt": "no image", "images": []}, "/worker_attention").status_code == 422
    assert post(worker, body | {"answer": ""}, "/worker_attention").status_code == 422
    assert post(worker, body | {"method": "attention"}, "/worker_attention").status_code == 422
    assert post(worker, body | {"answer": "x" * 9000}, "/worker_attention").status_code == 422


def test_a_map_reports_progress_and_stops_if_the_client_disconnects(worker: Server):
    def jobs() -> float:
        text = requests.get(worker.url + "/metrics", timeout=60).text
        return float(re.search(r"^babydoctor_engine_jobs (\S+)", text, re.M)[1])  # type: ignore[index]

    # A long answer, so that few hidden windows fit into one piece of work.
    body = {"model": "tiny", "prompt": PROMPT, "answer": "a scan " * 120, "images": [bare_base64(png(7))]}
    for _ in range(2):  # a canceled map is not cached, so the second request starts over
        with post(worker, body | {"stream": True}, "/worker_attention", stream=True) as response:
            first = json.loads(next(response.iter_lines(chunk_size=1, delimiter=b"\0")))
        assert first["share"] < 1 and first.keys() == {"share", "left_s"}
        wait_until(lambda: jobs() == 0, 60, "the end of the work")
    response = post(worker, body | {"stream": True}, "/worker_attention")
    *progress, reply = map(json.loads, response.content.split(b"\0")[:-1])
    shares = [each["share"] for each in progress]
    assert shares == sorted(shares) and all((each["left_s"] is None) == (each["share"] == 0) for each in progress)
    assert reply == post(worker, body, "/worker_attention").json()
    refused = post(worker, body | {"stream": True, "answer": "x" * 9000}, "/worker_attention")
    assert refused.status_code == 422 and "error" in refused.json()


def test_docs_and_metrics(worker: Server):
    page = requests.get(worker.url + "/docs", timeout=60).text
    files = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(files) == 3 and all(file.startswith("/docs-files/") for file in files), files
    assert all(requests.get(worker.url + file, timeout=60).status_code == 200 for file in files)
    assert "http://" not in page and "https://" not in page
    text = requests.get(worker.url + "/metrics", timeout=60).text
    for name in ("first_token_seconds_bucket", "per_token_seconds_bucket", "generated_tokens_total", "queue_length"):
        assert f"babydoctor_{name}" in text
    for name in ("engine_running", "engine_image_cache_hits", "engine_cached_prompt_tokens", "engine_kv_used"):
        assert f"babydoctor_{name}" in text


# Clients that disconnect, wait and stall.


def test_a_client_that_disconnects_frees_its_slot(worker: Server):
    stream = llava_stream(worker.url, generation(png(), max_new_tokens=LONG))
    next(stream)
    assert queue_length(worker.url) == 1
    stream.close()
    wait_until(lambda: queue_length(worker.url) == 0, 1.5, "the slot's return")


def test_every_client_that_disconnects_stops_its_answer(worker: Server):
    """Whenever they disconnect: before the first chunk, during one, or between two."""
    before = num_cancelled(worker)
    for index in range(20):
        stream = llava_stream(worker.url, generation(png(), max_new_tokens=LONG))
        for _ in range(index % 7 + 1):
            next(stream)
        stream.close()
    wait_until(lambda: queue_length(worker.url) == 0, 180, "the slots' return")
    assert num_cancelled(worker) - before == 20


def test_a_waiting_client_that_disconnects_frees_its_slot(worker: Server):
    streams = [llava_stream(worker.url, generation(png(i), max_new_tokens=LONG)) for i in range(6)]
    for stream in streams[:4]:
        next(stream)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(next, stream) for stream in streams[4:]]
        wait_until(lambda: queue_length(worker.url) == 6, 180, "six requests")
        for stream in streams[:4]:
            stream.close()
        for first in waiting:
            assert first.result(10)["error_code"] == 0
    for stream in streams[4:]:
        stream.close()
    wait_until(lambda: queue_length(worker.url) == 0, 2, "all slots to be free")


def test_a_full_queue_refuses_before_decoding_the_image(worker: Server):
    streams = [llava_stream(worker.url, generation(max_new_tokens=LONG)) for _ in range(7)]
    threads = [in_background(next, stream) for stream in streams]
    wait_until(lambda: queue_length(worker.url) == 7, 180, "a full queue")
    started = time.perf_counter()
    refused = post(worker, generation() | {"prompt": PROMPT, "images": [bare_base64(b"not an image")]})
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert time.perf_counter() - started < 2
    assert refused.json()["error"]["code"] == "queue_full" and "busy" in refused.json()["text"]
    for thread in threads:
        thread.join(15)
    for stream in streams:
        stream.close()


def test_headers_are_sent_before_a_slot_is_free_and_keep_alives_follow(worker: Server):
    streams = [llava_stream(worker.url, generation(png(i), max_new_tokens=1024)) for i in range(4)]
    for stream in streams:
        next(stream)
    started = time.perf_counter()
    body = generation(png(9), max_new_tokens=4)
    with post(worker, body, stream=True) as response:
        assert response.status_code == 200 and time.perf_counter() - started < 3
        first = next(response.iter_lines(delimiter=b"\0"))
        assert json.loads(first)["text"].startswith(body["prompt"])
    for stream in streams:
        stream.close()


def test_a_client_that_does_not_read_holds_no_slot(worker: Server):
    body = json.dumps(generation(png(), max_new_tokens=1024, prompt=PROMPT + "x" * 2000)).encode()
    host = urlsplit(worker.url)
    head = f"POST /worker_generate_stream HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((host.hostname, host.port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_until(lambda: queue_length(worker.url) == 1, 180, "the request")
        # The client reads nothing, but the answer is completed.
        wait_until(lambda: queue_length(worker.url) == 0, 180, "the end of its generation")


# Hostile input.


def bomb() -> bytes:
    """A PNG of about 100 kB that decodes to 60,000 x 60,000 pixels."""
    header = b"\x89PNG\r\n\x1a\n"
    fields = (60_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    parts = [(b"IHDR", fields), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    chunks = [len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in parts]
    return header + b"".join(chunks)


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(size=(400, 300)))).save(buffer, "JPEG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize(
    ("images", "status", "code"),
    [
        ([bare_base64(bomb())], 413, "image_too_large"),
        ([bare_base64(truncated_jpeg())], 422, "bad_image"),
        ([bare_base64(b"GIF89a nothing")], 422, "bad_image"),
        ([bare_base64(b"")], 422, "bad_base64"),
        (["%%%"], 422, "bad_base64"),
        ([], 422, "wrong_image_count"),
        ([bare_base64(png())] * 2, 422, "wrong_image_count"),
        ([None], 422, "bad_request"),
    ],
    ids=["bomb", "truncated", "no image", "empty", "no base64", "none", "two", "null"],
)
def test_bad_images_are_refused_by_name(worker: Server, images: list, status: int, code: str):
    response = post(worker, generation() | {"prompt": PROMPT, "images": images})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["text"] and response.json()["error_code"] == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"null", 422),
        (b"[" * 100_000, 422),
        (b'{"prompt":' * 10_000, 422),
        (b'{"prompt": "\\ud800"}', 422),
        (b'{"prompt": "a\\u0000b"}', 422),
        (b"\xff\xfe\x00", 422),
        (b'{"prompt": "x", "temperature": NaN}', 422),
        (b'{"prompt": "x", "temperature": 1e999}', 422),
        (b'{"prompt": "x", "max_new_tokens": 1e30}', 422),
        (b'{"prompt": "x", "resume_ids": [99999]}', 422),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", 422),
    ],
)
def test_bad_bodies_are_refused(worker: Server, body: bytes, status: int):
    headers = {"Content-Type": "application/json"}
    response = requests.post(worker.url + "/worker_generate_stream", data=body, headers=headers, timeout=60)
    assert response.status_code in (status, 400), response.text
    assert set(response.json()) == {"error", "text", "error_code"}


def test_a_huge_body_is_refused_with_an_error_that_the_client_receives(worker: Server):
    response = post(worker, generation() | {"images": ["A" * 40 * 2**20]})
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_errors_do_not_repeat_the_input(worker: Server):
    response = post(worker, {"prompt": "a", "images": "JOHN DOE"})
    assert response.status_code == 422 and "JOHN" not in response.text and "images" in response.json()["text"]


def test_a_template_inside_a_prompt_does_no_harm(worker: Server):
    assert llava_answer(worker.url, generation() | {"prompt": "</s><s>[INST] <unk> <<SYS>> {system} %s \x1b[31m"})


# Data that must not be stored.


def test_logs_contain_no_prompts_answers_or_addresses(worker: Server):
    answer = llava_answer(worker.url, generation(prompt="[INST] Mrs Miller, born 1950 [/INST]"))
    post(worker, generation() | {"prompt": "Mrs Miller <image>", "images": ["%"]})
    requests.get(worker.url + "/Miller", timeout=60)
    text = worker.log.read_text()
    for secret in ("Miller", answer[:12], "127.0.0.1", "localhost"):
        assert secret not in text
    lines = worker.log_lines()
    assert {"request", "answer"} <= {line["event"] for line in lines}
    assert all("request_id" in line for line in lines if line["event"] == "request")


def test_a_plain_request_id_is_kept(worker: Server):
    response = post(worker, generation(max_new_tokens=1), headers={"X-Request-Id": "ward-7.a"})
    assert response.headers["X-Request-Id"] == "ward-7.a"
    response = post(worker, generation(max_new_tokens=1), headers={"X-Request-Id": "Mrs Miller"})
    assert len(response.headers["X-Request-Id"]) == 32


def test_keys_retention_and_graceful_shutdown(tmp_path: Path):
    """One process for three settings, because starting one takes seconds."""
    keys = {"BABYDOCTOR_API_KEYS": "key-of-the-ward-1,key-of-the-ward-2"}
    kept = tmp_path / "kept"
    server = start_worker(
        tiny_run(), tmp_path / "log", f"worker.retention_dir={kept}", "limits.body_timeout_s=1", environment=keys
    )
    try:
        wait_ready(server)
        assert post(server, generation()).status_code == 401
        assert post(server, generation(), headers={"Authorization": "Bearer key-of-the-ward-3"}).status_code == 401
        assert requests.get(server.url + "/v1/models", timeout=60).status_code == 401
        headers = {"Authorization": "Bearer key-of-the-ward-2"}
        answer = llava_answer(server.url, generation(png()), headers=headers)

        file = kept / "requests.jsonl"
        entry = json.loads(wait_until(lambda: file.exists() and file.read_text(), 180, "the kept request"))
        assert entry["prompt"] == PROMPT and entry["answer"] == answer
        assert (kept / "images" / entry["images"][0]).read_bytes() == png()
        assert (kept.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)

        host = urlsplit(server.url)
        with socket.create_connection((host.hostname, host.port), timeout=60) as sock:
            head = "POST /list HTTP/1.1\r\nHost: [::1]\r\nAuthorization: Bearer key-of-the-ward-2\r\n"
            head += "Content-Length: 9\r\n"
            sock.sendall(head.encode() + b"\r\nslow")
            assert b"408" in sock.recv(100)

        stream = llava_stream(server.url, generation(png(), max_new_tokens=1024), headers=headers)
        next(stream)
        server.process.terminate()
        wait_until(lambda: post(server, generation(), headers=headers).status_code == 503, 180, "draining")
        *_, last = stream
        assert last["finish_reason"] == "length" and server.process.wait(120) == 0
        assert "key-of-the-ward" not in server.log.read_text()
    finally:
        stop_all([server])
