"""Attack servers under load: kill and freeze parts, stall connections and send hostile files.

``babydoctor bench chaos`` starts a controller and workers as ``babydoctor serve`` does. Clients ask questions whose
answers are known. It exits with 1 unless every complete answer was right, nothing hung, every refusal was one that a
client can act on, and at the end all parts were ready with no request left on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from babydoctor.bench.endurance.chaos_report import RIGHT, ChaosReport
from babydoctor.bench.endurance.hostile import hostile_files
from babydoctor.bench.questions import Questions, ask, send_image
from babydoctor.serve.launch import Launched, launched

HUNG_S = 120.0
"""An answer or a refusal that takes longer counts as hung. Failover waits 20 s, and a restart takes longer."""

BACK_S = 300.0
"""Everything must be ready again within this time after the last attack."""

NUM_IDLE = 200


@dataclass
class _Siege:
    """One run of the attacks."""

    served: Launched
    questions: Questions
    http: httpx.AsyncClient
    report: ChaosReport
    rng: random.Random
    until_s: float
    attack_every_s: float
    controller_up_s: float = 0.0
    """Since when the controller has been up; infinite while it is down."""

    @property
    def url(self) -> str:
        return self.served.controller_url

    async def run(self, clients: int) -> None:
        await asyncio.gather(
            *(self._client(random.Random(seed)) for seed in range(clients)),
            self._kill(),
            self._stall(),
            self._send_files(),
        )

    async def _client(self, rng: random.Random) -> None:
        while time.monotonic() < self.until_s:
            index = rng.randrange(len(self.questions.texts))
            started_s = time.monotonic()
            try:
                outcome = await asyncio.wait_for(ask(self.http, self.url, self.questions, index), HUNG_S)
            except (TimeoutError, asyncio.TimeoutError):
                outcome = "hung"
            outcome = self._explain(outcome, started_s)
            self.report.longest_s = max(self.report.longest_s, time.monotonic() - started_s)
            self.report.outcomes["answers"][outcome] += 1
            await asyncio.sleep(0.05 if outcome == RIGHT else 0.5)

    def _explain(self, outcome: str, started_s: float) -> str:
        """True if a broken connection is explained by a controller that was down during the request."""
        return (
            "lost with the controller" if outcome == "connection lost" and started_s < self.controller_up_s else outcome
        )

    async def _wait_for_controller(self) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await self.http.get(f"{self.url}/healthz")).status_code == 200:
                    self.controller_up_s = time.monotonic()
                    return
            await asyncio.sleep(0.1)

    async def _kill(self) -> None:
        """Kill or freeze one part after the other, the controller every fifth time."""
        turn = 0
        while time.monotonic() + self.attack_every_s < self.until_s:
            await asyncio.sleep(self.attack_every_s * self.rng.uniform(0.7, 1.3))
            turn += 1
            is_controller = turn % 5 == 0
            able = [
                child
                for child in self.served.children
                if (child.name == "controller") == is_controller and child.exit_status is None
            ]
            if not able:
                continue
            child = self.rng.choice(able)
            if not is_controller and turn % 3 == 0:
                await self._freeze(child.process.pid)
                continue
            if is_controller:
                self.controller_up_s = float("inf")
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGKILL)
            self.report.outcomes["kills"]["controller" if is_controller else "worker"] += 1
            if is_controller:
                await self._wait_for_controller()

    async def _freeze(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(min(5.0, self.attack_every_s))
            os.kill(pid, signal.SIGCONT)
        self.report.outcomes["kills"]["frozen worker"] += 1

    async def _stall(self) -> None:
        """Open connections that send nothing or half a request, and check that the server closes them."""
        heads = (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ")
        host, port = urlsplit(self.url).hostname, urlsplit(self.url).port
        while time.monotonic() < self.until_s:
            opened = []
            for index in range(NUM_IDLE):
                with contextlib.suppress(OSError):  # the controller may be down
                    reader, writer = await asyncio.open_connection(host, port)
                    writer.write(heads[index % 2])
                    opened.append((reader, writer))
            for reader, writer in opened:
                try:
                    await asyncio.wait_for(reader.read(), HUNG_S)
                    outcome = "closed"
                except (TimeoutError, asyncio.TimeoutError):
                    outcome = "kept open"
                except OSError:
                    outcome = "closed"
                self.report.outcomes["idle connections"][outcome] += 1
                writer.close()
            await asyncio.sleep(1)

    async def _send_files(self) -> None:
        files = await asyncio.to_thread(hostile_files)
        while time.monotonic() < self.until_s:
            for data in files.values():
                started_s = time.monotonic()
                try:
                    outcome = await asyncio.wait_for(send_image(self.http, self.url, self.questions, data), HUNG_S)
                except (TimeoutError, asyncio.TimeoutError):
                    outcome = "hung"
                outcome = self._explain(outcome, started_s)
                if outcome == "lost with its worker":  # killed by us in the meantime
                    outcome = "refused 503"
                self.report.outcomes["hostile files"][outcome] += 1
                if time.monotonic() > self.until_s:
                    return
            await asyncio.sleep(1)

    async def recover(self) -> None:
        """Wait until all parts are ready and idle, and ask every question once more."""
        started_s = time.monotonic()
        urls = [self.url, *self.served.worker_urls]
        problem = "not ready"
        while time.monotonic() < started_s + BACK_S:
            problem = await self._problem(urls)
            if not problem:
                break
            await asyncio.sleep(0.2)
        if problem:
            self.report.left.append(f"{BACK_S:.0f} s after the last attack: {problem}")
            return
        self.report.seconds_to_recover = time.monotonic() - started_s
        for index in range(len(self.questions.texts)):
            outcome = await ask(self.http, self.url, self.questions, index)
            if outcome != RIGHT:
                self.report.left.append(f"question {index} at the end: {outcome}")

    async def _problem(self, urls: Sequence[str]) -> str:
        for url in urls:
            try:
                ready = await self.http.get(f"{url}/readyz")
                if ready.status_code != 200:
                    return f"{url} is not ready"
                status = (await self.http.post(f"{url}/worker_get_status", headers=self._secret())).json()
                if status["queue_length"]:
                    return f"{url} still holds {status['queue_length']} requests"
            except (httpx.HTTPError, ValueError) as error:
                return f"{url} does not answer ({type(error).__name__})"
        workers = (await self.http.get(f"{self.url}/workers", headers=self._secret())).json()
        in_rotation = sum(not worker["failed"] and not worker["draining"] for worker in workers)
        return "" if in_rotation == len(urls) - 1 else f"{in_rotation} of {len(urls) - 1} workers are in rotation"

    def _secret(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.served.secret}"}


def run_chaos(
    run: Path | None,
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    clients: int = 32,
    seconds: float = 300,
    workers: int = 2,
    attack_every_s: float = 10,
    seed: int = 0,
    on_event: Callable[[str], None] = lambda text: None,
) -> ChaosReport:
    """Start everything on free ports of this machine and attack it.

    Args:
        run: what to serve; None: the mini model with random weights, written to ``folder``.
        overrides: ``key=value`` settings of ``babydoctor serve``.
        attack_every_s: between two kills.
    """
    if run is None:
        from babydoctor.bench.serve_model import build_model, build_tokenizer, write_run

        on_event("building the mini model with random weights")
        run = write_run(
            build_model("mini").float(), build_tokenizer(["Question: what is seen?"]), folder, "mini", "float32"
        )
    report, stop = ChaosReport(), threading.Event()

    def on_restart(text: str) -> None:
        report.restarts += 1

    settings = ["controller.port=0", "worker.port=0", "worker.heart_beat_s=1", *overrides]
    with launched(
        run, overrides=settings, num_workers=workers, page=False, log_level="CRITICAL", on_event=on_event
    ) as served:
        questions = Questions.learn(served.controller_url)
        supervising = threading.Thread(target=served.supervise, args=(on_restart, stop))
        supervising.start()
        try:
            asyncio.run(_besiege(served, questions, report, clients, seconds, attack_every_s, seed, on_event))
        finally:
            stop.set()
            supervising.join()
    return report


async def _besiege(
    served: Launched,
    questions: Questions,
    report: ChaosReport,
    clients: int,
    seconds: float,
    attack_every_s: float,
    seed: int,
    on_event: Callable[[str], None],
) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients, keepalive_expiry=2)
    started_s = time.monotonic()
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as http:
        rng = random.Random(seed)
        siege = _Siege(served, questions, http, report, rng, started_s + seconds, attack_every_s)
        telling = asyncio.ensure_future(_tell(siege, on_event))
        await siege.run(clients)
        telling.cancel()
        report.seconds = time.monotonic() - started_s
        on_event("waiting until all parts are ready again")
        await siege.recover()


async def _tell(siege: _Siege, on_event: Callable[[str], None]) -> None:
    while True:
        done = siege.report.outcomes
        left_s = max(0, siege.until_s - time.monotonic())
        on_event(f"{done['answers'][RIGHT]} right answers, {done['kills'].total()} kills, {left_s:.0f} s left")
        await asyncio.sleep(1)
