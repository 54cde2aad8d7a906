"""The choice of a worker for the next request."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from babydoctor.schema import UserError
from babydoctor.serve.api.protocol import WorkerStatus
from babydoctor.serve.controller.registry import Registry, check_worker_url


def status(*names: str, speed: float = 1, queue: int = 0) -> WorkerStatus:
    return WorkerStatus(model_names=list(names), speed=speed, queue_length=queue)


def registry(dispatch: str = "shortest_queue") -> Registry:
    return Registry(dispatch, expiry_s=30, rng=random.Random(0))


def test_the_lottery_follows_speed():
    workers = registry("lottery")
    workers.register("http://a", status("m", speed=3), True, 0)
    workers.register("http://b", status("m", speed=1), True, 0)
    counts = Counter(workers.pick("m", 0).url for _ in range(4000))
    assert counts["http://a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_shortest_queue_counts_speed_and_requests_sent_since_the_report():
    workers = registry()
    fast = workers.register("http://fast", status("m", speed=2, queue=3), True, 0)
    slow = workers.register("http://slow", status("m", speed=1, queue=2), True, 0)
    assert workers.pick("m", 0) is fast
    workers.begin(fast)
    workers.begin(fast)
    assert workers.pick("m", 0) is slow
    workers.end(fast)
    workers.end(fast)
    assert workers.pick("m", 0) is fast


def test_loads_do_not_drift():
    workers = registry()
    record = workers.register("http://a", status("m"), True, 0)
    workers.begin(record)
    workers.report("http://a", 1, 1)  # the worker's report includes that request
    assert record.load == 1
    workers.end(record)
    assert record.load == 0
    for _ in range(5):
        workers.hand_out(record)
    assert record.load == 5
    workers.report("http://a", 0, 2)
    assert record.load == 0 and record.inflight == 0


def test_silent_workers_expire_unless_heartbeats_are_off():
    workers = registry()
    workers.register("http://a", status("m"), True, 0)
    workers.register("http://b", status("n"), False, 0)
    workers.report("http://a", 0, 20)
    assert workers.models(49) == ["m", "n"]
    assert workers.models(51) == ["n"]
    assert workers.report("http://a", 0, 52) is None


def test_a_failed_worker_returns_when_it_is_reached_or_registers_again():
    workers = registry()
    record = workers.register("http://a", status("m"), True, 0)
    record.failed = True
    assert workers.pick("m", 0) is None and workers.models(0) == [] and not workers.is_current(record)
    workers.note_status(record, status("m"), 1)
    assert workers.pick("m", 1) is record
    record.failed = True
    again = workers.register("http://a", status("m"), True, 2)
    assert workers.pick("m", 2) is again
    workers.end(record)  # a request to the old process ends late
    assert again.load == 0 and not workers.is_current(record)


def test_draining_and_excluded_workers_are_skipped():
    workers = registry()
    a = workers.register("http://a", status("m"), True, 0)
    b = workers.register("http://b", status("m"), True, 0)
    assert workers.pick("m", 0, [a]) is b
    b.status = b.status.model_copy(update={"draining": True})
    assert workers.pick("m", 0, [a]) is None and workers.pick("m", 0) is a


def test_logs_can_name_a_worker_without_its_address():
    record = registry().register("http://10.1.2.3:21002", status("m"), True, 0)
    assert record.worker_id.startswith("w-") and "10.1" not in record.worker_id


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:21002",
        "ftp://a",
        "http://",
        "http://a:99999",
        "http://a:x",
        "http://u:p@a",
        "http://a?x",
        "http://[::1",
        "http://0.0.0.0:21002",
    ],
)
def test_invalid_addresses_are_refused(url: str):
    with pytest.raises(UserError):
        check_worker_url(url)


def test_trailing_slashes_are_removed_from_addresses():
    assert check_worker_url("http://a:1/") == "http://a:1"
