"""``babydoctor bench soak``: run many clients for minutes, some of which disconnect early.

This starts a controller and workers on loopback and sends requests over both APIs. The exit status is 1 unless 429 was
the only error, all request slots are free again at the end, and the memory of no process grew in the second half.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.client import open_llava_stream

NUM_IMAGES = 32

SHORTEST, LONGEST = 16, 128
"""New tokens of an answer. Each client asks for the longest answer until it has been answered once. The operating
system allocates the pages of a worker's KV cache on first use, so all pages are allocated before growth is judged."""

MAX_GROWTH = 0.05
"""Largest relative growth of memory from the third quarter to the last. A leak grows steadily, while steps of an
allocator and first uses of pages become rare."""


@dataclass
class SoakReport:
    """The result of a soak test. ``rss_bytes`` holds the memory of each server over time."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    rss_bytes: dict[str, list[float]] = field(default_factory=dict)
    slots_taken: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def faults(self) -> list[str]:
        """The faults as text; empty if there are none."""
        faults = [f"{n} x {what}" for what, n in self.outcomes.items() if what not in ("answered", "left", "busy")]
        faults += [f"{url}: {n} request slots are still taken" for url, n in self.slots_taken.items() if n]
        for url, values in self.rss_bytes.items():
            before, after = _last_quarters(values)
            if after > before * (1 + MAX_GROWTH):
                faults.append(f"{url}: memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
        if not self.outcomes["answered"]:
            faults.append("no request was answered")
        return faults

    def lines(self) -> list[str]:
        """The report as lines of text."""
        first = np.array(self.first_token_s or [0.0])
        lines = [
            f"{self.seconds:.0f} s: " + ", ".join(f"{n} {what}" for what, n in sorted(self.outcomes.items())),
            f"{self.num_tokens / self.seconds:.0f} tokens/s, first token p50 {np.quantile(first, 0.5):.2f} s, "
            f"p95 {np.quantile(first, 0.95):.2f} s",
        ]
        for url, values in self.rss_bytes.items():
            before, after = _last_quarters(values)
            lines.append(
                f"{url}: memory {before / 2**20:.0f} MiB in the third quarter, {after / 2**20:.0f} in the last"
            )
        return lines


def _last_quarters(values: list[float]) -> tuple[float, float]:
    """Medians of the third and the last quarter."""
    quarter = max(1, len(values) // 4)
    return float(np.median(values[-2 * quarter : -quarter] or values)), float(np.median(values[-quarter:]))


async def soak(
    url: str, server_urls: list[str], model: str, template: str, *, clients: int, seconds: float
) -> SoakReport:
    """Run the clients against ``url``.

    Args:
        server_urls: servers whose memory is watched. Workers must also have free request slots at the end.
        template: name of the model's conversation template.
    """
    report = SoakReport(rss_bytes={server: [] for server in server_urls})
    # Close idle connections before the server does (after 5 s); a request sent at that moment would be lost.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients, keepalive_expiry=2)
    started = time.monotonic()
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as http:
        watching = asyncio.ensure_future(_watch(http, server_urls, report))
        users = [_User(http, url, model, template, report, seed) for seed in range(clients)]
        await asyncio.gather(*(user.run(started + seconds) for user in users))
        report.seconds = time.monotonic() - started
        await asyncio.sleep(3)
        watching.cancel()
        for server in server_urls:
            status = (await http.post(f"{server}/worker_get_status")).json()
            report.slots_taken[server] = status["queue_length"]
    return report


async def _watch(http: httpx.AsyncClient, server_urls: list[str], report: SoakReport) -> None:
    while True:
        for server in server_urls:
            text = (await http.get(f"{server}/metrics")).text
            if match := re.search(r"^process_resident_memory_bytes (\S+)", text, re.M):
                report.rss_bytes[server].append(float(match.group(1)))
        await asyncio.sleep(2)


class _User:
    """A client that sends requests, sometimes disconnects early, and retries later when the server is busy."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, model: str, template: str, report: SoakReport, seed: int
    ) -> None:
        self._http = http
        self._url = url
        self._model = model
        self._template = template
        self._report = report
        self._random = random.Random(seed)
        self._was_answered = False

    async def run(self, until: float) -> None:
        await asyncio.sleep(self._random.random())
        while time.monotonic() < until:
            try:
                outcome = await (self._llava() if self._random.random() < 0.5 else self._openai())
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self._report.outcomes[outcome] += 1
            self._was_answered = self._was_answered or outcome == "answered"
            await asyncio.sleep(self._random.uniform(0.5, 2) if outcome == "busy" else 0.05)

    def _leaves_after(self) -> int:
        """Number of pieces of the answer after which this client disconnects; a tenth of the requests do."""
        return self._random.randrange(0, 20) if self._random.random() < 0.1 else 10**9

    def _max_new_tokens(self) -> int:
        return self._random.randrange(SHORTEST, LONGEST) if self._was_answered else LONGEST

    def _image(self) -> str:
        return base64.b64encode(noise(self._random.randrange(NUM_IMAGES))).decode()

    async def _llava(self) -> str:
        from babydoctor.conversation import get_template, prompt_text, render_prompt
        from babydoctor.schema import Turn

        turn = Turn("user", f"<image>\nQuestion {self._random.randrange(1000)}: what is seen?")
        body = {
            "model": self._model,
            "prompt": prompt_text(render_prompt([turn], get_template(self._template))),
            "images": [self._image()],
            "temperature": 0.7,
            "max_new_tokens": self._max_new_tokens(),
            "stop": "</s>",
        }
        num_pieces, leaves_after, started, is_complete = 0, self._leaves_after(), time.monotonic(), False
        try:
            async with open_llava_stream(self._http, body, url=self._url) as stream:
                async for delta in stream:
                    if delta.error is not None:
                        return f"error {delta.error.code}"
                    is_complete = is_complete or delta.finish_reason is not None
                    if delta.text:
                        num_pieces += 1
                        self._note_piece(num_pieces, started)
                    if num_pieces > leaves_after:
                        return "left"
        except ApiError as error:
            return "busy" if error.status == 429 else f"status {error.status}"
        return "answered" if is_complete else "broke off"

    async def _openai(self) -> str:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{self._image()}"}}
        text = {"type": "text", "text": f"Question {self._random.randrange(1000)}: what is seen?"}
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": [text, image]}],
            "max_tokens": self._max_new_tokens(),
            "stream": True,
        }
        num_pieces, leaves_after, started, done = 0, self._leaves_after(), time.monotonic(), False
        async with self._http.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return "busy" if response.status_code == 429 else f"status {response.status_code}"
            async for line in response.aiter_lines():
                if '"error"' in line:
                    return "error event"
                done = done or line == "data: [DONE]"
                if '"content": "' in line:
                    num_pieces += 1
                    self._note_piece(num_pieces, started)
                if num_pieces > leaves_after:
                    return "left"
        return "answered" if done else "broke off"

    def _note_piece(self, number: int, started: float) -> None:
        self._report.num_tokens += 1
        if number == 1:
            self._report.first_token_s.append(time.monotonic() - started)


def noise(seed: int) -> bytes:
    """A PNG of noise that depends on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def run_soak(
    run: Path | None,
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    clients: int = 200,
    seconds: float = 180,
    workers: int = 1,
    on_event: Callable[[str], None] = lambda text: None,
) -> SoakReport:
    """Start a controller and workers on free ports of this machine and run the clients.

    Args:
        run: what to serve; None: the mini model with random weights, written to ``folder``.
        overrides: ``key=value`` settings of ``babydoctor serve``.
    """
    from babydoctor.serve.client import Client
    from babydoctor.serve.launch import launched

    if run is None:
        from babydoctor.bench.serve_model import build_model, build_tokenizer, write_run

        on_event("building the mini model with random weights")
        run = write_run(build_model("mini"), build_tokenizer(["Question: what is seen?"]), folder, "mini")
    settings = ["controller.port=0", "worker.port=0", *overrides]
    with launched(run, overrides=settings, num_workers=workers, page=False, on_event=on_event) as served:
        with Client(served.controller_url) as client:
            model = client.models()[0]
            template = client.template(model)
        on_event(f"{clients} clients for {seconds:.0f} s")
        servers = [served.controller_url, *served.worker_urls]
        return asyncio.run(soak(served.controller_url, servers, model, template, clients=clients, seconds=seconds))
