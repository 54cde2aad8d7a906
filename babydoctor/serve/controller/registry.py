"""The registered workers, and the choice of a worker for the next request. Pure: no clock, no network.

A worker is in rotation while its heartbeats arrive and no connection to it has failed. Its load is the number that it
reported last plus the requests sent since. Each report resets that count, so errors do not accumulate.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from babydoctor.schema import UserError
from babydoctor.serve.api.protocol import WorkerStatus

Dispatch = Literal["lottery", "shortest_queue"]


@dataclass(slots=True, eq=False)
class WorkerRecord:
    """One registered worker. A worker that registers again gets a new record, which forgets old failures."""

    url: str
    status: WorkerStatus
    check_heart_beat: bool
    last_seen_s: float
    knows_secret: bool = False
    """The worker registered with the registration secret, so the secret may be sent to it."""
    failed: bool = False
    """A connection to the worker failed, and no probe has succeeded since."""
    proven: bool = False
    """The controller has reached the worker at this URL."""
    doubtful: bool = False
    """A probe could not reach the worker. It gets requests only if there is no other worker."""
    inflight: int = 0
    """Requests that this controller has open on the worker."""
    unreported: int = 0
    """Requests sent minus requests ended since the worker's last report."""
    without_token: set[object] = field(default_factory=set)
    """Requests on the worker for which it has not sent a token yet."""
    suspects: frozenset[object] | None = None
    """``without_token`` when the worker was lost: one of these requests may have caused it."""
    worker_id: str = field(init=False)

    def __post_init__(self) -> None:
        # Logs use this id, because an address in a log would tell where patients' images go.
        self.worker_id = "w-" + hashlib.sha256(self.url.encode()).hexdigest()[:8]

    def note_loss(self) -> None:
        """Record the suspects when the worker is lost. Later losses of the same record change nothing."""
        if self.suspects is None:
            self.suspects = frozenset(self.without_token)

    @property
    def load(self) -> float:
        """Requests running and waiting, per unit of speed.

        A report may be older than a request that is on its way, so the load is at least what this controller has open.
        """
        return max(self.status.queue_length + self.unreported, self.inflight, 0) / self.status.speed


def check_worker_url(url: str) -> str:
    """Check a worker's URL and return it without trailing slashes.

    Raises:
        UserError: it is not of the form ``http(s)://host:port``, or its host is not an address to connect to.
    """
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid, parts = False, urlsplit("")
    plain = not (parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid or not plain:
        raise UserError(f"worker_name {url!r} is not an address like http://10.0.0.5:21002", code="address_invalid")
    if parts.hostname in ("0.0.0.0", "::"):
        raise UserError(
            f"worker_name {url!r}: {parts.hostname} is no address to connect to; give the address of the machine",
            code="address_invalid",
        )
    return url.rstrip("/")


class Registry:
    """The workers by URL."""

    def __init__(self, dispatch: Dispatch, expiry_s: float, rng: random.Random | None = None) -> None:
        self.dispatch = dispatch
        self.expiry_s = expiry_s
        self.records: dict[str, WorkerRecord] = {}
        self._rng = rng or random.Random()

    def register(
        self, url: str, status: WorkerStatus, check_heart_beat: bool, now_s: float, *, knows_secret: bool = False
    ) -> WorkerRecord:
        """Register a worker, or register it again after a restart."""
        old = self.records.get(url)
        record = WorkerRecord(url, status, check_heart_beat, now_s, knows_secret)
        if old is not None:
            record.inflight = old.inflight
        self.records[url] = record
        return record

    def remove(self, url: str) -> None:
        self.records.pop(url, None)

    def report(self, url: str, queue_length: int, now_s: float, *, draining: bool | None = None) -> WorkerRecord | None:
        """Record a heartbeat. Return None if the worker is unknown and must register again."""
        record = self.records.get(url)
        if record is not None:
            record.last_seen_s = now_s
            changed: dict[str, object] = {"queue_length": queue_length}
            if draining is not None:
                changed["draining"] = draining
            record.status = record.status.model_copy(update=changed)
            record.unreported = 0
        return record

    def note_status(self, record: WorkerRecord, status: WorkerStatus, now_s: float) -> None:
        """Record a successful probe, and the status that it returned."""
        record.status = status
        record.unreported = 0
        record.last_seen_s = now_s
        record.failed = record.doubtful = False
        record.suspects = None
        record.proven = True

    def expire(self, now_s: float) -> list[WorkerRecord]:
        """Remove and return the workers whose heartbeats have stopped."""
        gone = [r for r in self.records.values() if r.check_heart_beat and now_s - r.last_seen_s > self.expiry_s]
        for record in gone:
            self.remove(record.url)
        return gone

    def is_current(self, record: WorkerRecord) -> bool:
        """True unless the record has expired, failed, or been replaced after a restart."""
        return self.records.get(record.url) is record and not record.failed

    def in_rotation(self, now_s: float) -> list[WorkerRecord]:
        self.expire(now_s)
        return [r for r in self.records.values() if not r.failed and not r.status.draining]

    def models(self, now_s: float) -> list[str]:
        """Sorted names of the models that can answer now."""
        return sorted({name for r in self.in_rotation(now_s) for name in r.status.model_names})

    def pick(self, model: str, now_s: float, exclude: Collection[WorkerRecord] = ()) -> WorkerRecord | None:
        """Choose a worker for one request; None if no worker in rotation serves the model."""
        able = [r for r in self.in_rotation(now_s) if model in r.status.model_names and r not in exclude]
        able = [r for r in able if not r.doubtful] or able
        if not able:
            return None
        if self.dispatch == "lottery":
            return self._rng.choices(able, weights=[r.status.speed for r in able])[0]
        least = min(r.load for r in able)
        return self._rng.choice([r for r in able if r.load == least])

    def begin(self, record: WorkerRecord) -> None:
        """Count a request that is sent to the worker."""
        record.inflight += 1
        record.unreported += 1

    def end(self, record: WorkerRecord) -> None:
        """Count the end of that request."""
        record.inflight -= 1
        record.unreported -= 1

    def hand_out(self, record: WorkerRecord) -> None:
        """Count a request that a client sends to the worker itself. The next report corrects the count."""
        record.unreported += 1
