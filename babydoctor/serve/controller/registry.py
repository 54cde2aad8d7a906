"""The registered workers, and which one gets the next request. Pure: no clock, no network.

A worker is in rotation while its heartbeats arrive and no connection to it has failed. Its load is what it reported
last plus what was sent to it since; each report resets the count, so errors do not accumulate.
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
    """One registered worker. A worker that registers again gets a new record, so old failures do not stick to it."""

    url: str
    status: WorkerStatus
    check_heart_beat: bool
    last_seen_s: float
    knows_secret: bool = False
    """It registered with the registration secret, so the secret may be sent to it."""
    failed: bool = False
    """A connection to it failed and no probe has succeeded since."""
    proven: bool = False
    """The controller has reached it at this URL."""
    doubtful: bool = False
    """The controller could not reach it; it gets requests only if there is no other."""
    inflight: int = 0
    """Requests that this controller has open on it."""
    unreported: int = 0
    """Requests sent, minus requests ended, since its last report."""
    untouched: set[object] = field(default_factory=set)
    """Requests on it of which it has not sent a token."""
    suspects: frozenset[object] | None = None
    """What ``untouched`` held when the worker was lost: one of these may have been the reason."""
    worker_id: str = field(init=False)

    def __post_init__(self) -> None:
        # Logs name workers by this id: an address in a log says where patients' images go.
        self.worker_id = "w-" + hashlib.sha256(self.url.encode()).hexdigest()[:8]

    def note_loss(self) -> None:
        """The worker was lost. Only the first loss of a record says who was there."""
        if self.suspects is None:
            self.suspects = frozenset(self.untouched)

    @property
    def load(self) -> float:
        """Requests running and waiting, per unit of speed.

        A report may cross a request on its way to the worker, so what this controller has open there counts at least.
        """
        return max(self.status.queue_length + self.unreported, self.inflight, 0) / self.status.speed


def check_worker_url(url: str) -> str:
    """Return the URL without its last slash.

    Raises:
        UserError: it is not an ``http(s)://host:port`` under which a worker could be called.
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
            f"worker_name {url!r}: nobody can call {parts.hostname}; give the address of that machine",
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
        """Note a heartbeat. None: the worker is unknown and has to register again."""
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
        """A probe succeeded: the worker is reachable and reports this."""
        record.status = status
        record.unreported = 0
        record.last_seen_s = now_s
        record.failed = record.doubtful = False
        record.suspects = None
        record.proven = True

    def expire(self, now_s: float) -> list[WorkerRecord]:
        """Drop and return the workers whose heartbeats have stopped."""
        gone = [r for r in self.records.values() if r.check_heart_beat and now_s - r.last_seen_s > self.expiry_s]
        for record in gone:
            self.remove(record.url)
        return gone

    def is_current(self, record: WorkerRecord) -> bool:
        """Whether the record is neither expired, nor replaced after a restart, nor failed."""
        return self.records.get(record.url) is record and not record.failed

    def in_rotation(self, now_s: float) -> list[WorkerRecord]:
        self.expire(now_s)
        return [r for r in self.records.values() if not r.failed and not r.status.draining]

    def models(self, now_s: float) -> list[str]:
        """Names of the models that can be asked now, sorted."""
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
        """A request goes to this worker."""
        record.inflight += 1
        record.unreported += 1

    def end(self, record: WorkerRecord) -> None:
        """That request is over."""
        record.inflight -= 1
        record.unreported -= 1

    def hand_out(self, record: WorkerRecord) -> None:
        """A client got this address and will call it itself; the next report corrects the count."""
        record.unreported += 1
