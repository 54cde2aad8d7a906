"""Attacks on real servers: stuck engines, requests that kill a worker, dead decoders, and very costly files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from helpers.serving import (
    Server,
    bare_base64,
    free_port,
    generation,
    in_background,
    llava_answer,
    llava_stream,
    png,
    start_controller,
    stop_all,
    tiny_run,
    wait_ready,
    wait_until,
)

from babydoctor.bench.endurance.hostile import hostile_files, png_bomb
from babydoctor.imaging.isolation import DecodePool
from babydoctor.imaging.limits import DecodeLimits, ImageError

TESTS = Path(__file__).parent


def faulty_worker(log: Path, *settings: str) -> Server:
    """See ``helpers/faulty_worker.py``."""
    port = free_port()
    command = [sys.executable, "-m", "helpers.faulty_worker", str(tiny_run()), str(port), *settings]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    return Server(f"http://127.0.0.1:{port}", process, log)


def ask(url: str, text: str) -> dict:
    """The last message of an answer on LLaVA's protocol, an error or not."""
    try:
        *_, last = llava_stream(url, generation(max_new_tokens=8) | {"prompt": f"[INST] {text} [/INST]"})
    except ValueError:  # no message at all
        return {"error_code": -1}
    return last


# Files. Before decoding ran in separate processes, the first two never ended or took 7 GB, the third 2.7 GB, the fourth
# 125 s.


@pytest.mark.parametrize("name", ["jp2 box of length 0", "decoy SIZ marker", "deflated zeros", "progressive scans"])
def test_a_hostile_file_fails_only_its_own_request(name: str) -> None:
    data, pool = hostile_files()[name], DecodePool(size=1)
    try:
        pool.decode(png_bomb(8), "good", {}, DecodeLimits())
        pid, peaks, done = pool._idle[0].pid, [0], threading.Event()
        watching = threading.Thread(target=_watch_peak, args=(pid, peaks, done))
        watching.start()
        with pytest.raises(ImageError) as refused:
            pool.decode(data, "hostile", {}, DecodeLimits(seconds=1))
        done.set()
        watching.join()
        assert len(data) < 60_000 and refused.value.code.startswith(("image_", "dicom_"))
        assert peaks[0] < 700, "MB"
        assert pool.decode(png_bomb(8), "good", {}, DecodeLimits())[0].shape == (8, 8, 3)
    finally:
        pool.close()


def _watch_peak(pid: int, peaks: list[int], done: threading.Event) -> None:
    while not done.wait(0.01):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        peaks += [int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")]
        peaks[:] = [max(peaks)]


def test_a_jp2_box_without_a_length_is_refused_at_once() -> None:
    """The endless loop itself is fixed. Isolation is the second line of defense."""
    from babydoctor.imaging.load import load_image

    with pytest.raises(ImageError, match="no length"):
        load_image(hostile_files()["jp2 box of length 0"])


def test_a_decoder_that_does_not_start_is_a_server_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = DecodePool(size=1)
    try:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            with pytest.raises(ImageError) as refused:
                pool.decode(png_bomb(8), "good", {}, DecodeLimits())
            assert refused.value.code == "image_decoder_down" and pool.is_down
            pool.try_start()
            assert pool.is_down
        pool.try_start()
        assert not pool.is_down and pool.decode(png_bomb(8), "good", {}, DecodeLimits())[0].shape == (8, 8, 3)
    finally:
        pool.close()


# A worker that is stuck. Before: /readyz stayed 200, the stream ran into its deadline of 300 s, and SIGTERM waited for
# the stuck thread forever.


def test_a_stuck_engine_is_not_ready_fails_its_answers_and_ends(tmp_path: Path) -> None:
    worker = faulty_worker(
        tmp_path / "log", "worker.controller=null", "limits.stuck_s=2", "worker.drain_s=60", "limits.keep_alive_s=0.5"
    )
    try:
        wait_ready(worker)
        started = time.monotonic()
        last = ask(worker.url, "HANG")
        assert last["error_code"] == 1 and "stuck" in last["text"]
        assert time.monotonic() - started < 60
        unready = requests.get(f"{worker.url}/readyz", timeout=10)
        assert unready.status_code == 503 and "stuck" in unready.json()["error"]["message"]
        refused = requests.post(f"{worker.url}/worker_generate_stream", json=generation(), timeout=10)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert requests.post(f"{worker.url}/worker_get_status", timeout=10).json()["draining"] is True
        worker.process.terminate()
        started = time.monotonic()
        worker.process.wait(90)
        assert time.monotonic() - started < 60
        assert "Timeout" in worker.log.read_text()  # the stack traces show where it was stuck
    finally:
        stop_all([worker])


# A request that kills its worker. Before: it was sent to the next worker, and then to the restarted one.


def test_a_request_that_killed_a_worker_is_not_sent_to_another(tmp_path: Path) -> None:
    controller = start_controller(tmp_path / "controller.log")
    settings = (f"worker.controller={controller.url}", "worker.heart_beat_s=0.5")
    workers = [faulty_worker(tmp_path / f"worker-{index}.log", *settings) for index in range(2)]
    try:
        for server in (controller, *workers):
            wait_until(lambda url=server.url: requests.get(f"{url}/healthz", timeout=5).ok, 180, "start")
        found = f"{controller.url}/workers"
        wait_until(lambda: len(requests.get(found, timeout=5).json()) == 2, 180, "two workers")
        body = generation(png(), max_new_tokens=400)
        expected = llava_answer(controller.url, body)
        answers: list[str] = []
        bystander = in_background(lambda: answers.append(llava_answer(controller.url, body)))
        last = ask(controller.url, "KILL")
        assert last["error_code"] == 3 and "not given to another" in last["text"]
        bystander.join(120)
        assert answers == [expected]
        assert [worker.process.poll() for worker in workers].count(None) == 1
        metrics = requests.get(f"{controller.url}/metrics", timeout=5).text
        assert "babydoctor_quarantined_total 1.0" in metrics
    finally:
        stop_all([controller, *workers])


def test_bare_base64_of_a_hostile_file_is_a_422(tmp_path: Path) -> None:
    from helpers.serving import tiny_worker

    worker = tiny_worker()
    for name in ("jp2 box of length 0", "decoy SIZ marker", "truncated PNG"):
        body = generation(png()) | {"images": [bare_base64(hostile_files()[name])]}
        assert requests.post(f"{worker.url}/worker_generate_stream", json=body, timeout=60).status_code == 422
    assert requests.get(f"{worker.url}/readyz", timeout=10).status_code == 200


def test_a_short_chaos_run_finds_no_fault(tmp_path: Path) -> None:
    from babydoctor.bench.endurance.chaos import run_chaos

    report = run_chaos(
        tiny_run(), tmp_path, overrides=["limits.head_timeout_s=2"], clients=6, seconds=14, attack_every_s=3
    )
    assert report.faults() == [], report
    kinds = {kind: counts.total() for kind, counts in report.outcomes.items()}
    assert kinds["kills"] >= 2 and kinds["idle connections"] >= 100 and kinds["hostile files"] >= 3, kinds
