"""Run controller, workers and web UI as child processes of one command, which ends them when it ends."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from babydoctor.cores import num_cores
from babydoctor.errors import DEFAULT_EXIT_STATUS, UserError
from babydoctor.serve.process import LOG_LEVEL_VARIABLE, PARENT_VARIABLE, Child
from babydoctor.serve.server import END_S, WILDCARDS, bind
from babydoctor.serve.settings import (
    SECRET_VARIABLE,
    Secrets,
    ServeSettings,
    check_exposure,
    load_secrets,
    load_settings,
)


@dataclass
class Launched:
    """The running parts."""

    children: list[Child]
    controller_url: str
    worker_urls: list[str]
    page_url: str | None
    secret: str

    def supervise(self, on_event: Callable[[str], None], stop: threading.Event | None = None) -> None:
        """Watch the parts, and restart each one that ends, until ``stop`` is set (None: forever)."""
        stop = stop or threading.Event()
        while not stop.wait(0.2):
            for child in self.children:
                if child.exit_status is None:
                    continue
                if child.restart_at_s is None:
                    delay_s = child.plan_restart(time.monotonic())
                    on_event(f"{child.name} ended with status {child.exit_status}; restarting it in {delay_s:g} s")
                elif time.monotonic() >= child.restart_at_s:
                    child.start()

    def stop(self, timeout_s: float) -> None:
        """Stop the web UI, then the controller, which may finish its answers, then the workers."""
        try:
            for child in reversed(self.children):
                if not child.name.startswith("worker"):
                    child.terminate()
                    child.wait(timeout_s)
            workers = [child for child in self.children if child.name.startswith("worker")]
            for child in workers:
                child.terminate()
            for child in workers:
                child.wait(timeout_s)
        except KeyboardInterrupt:
            pass  # a second Ctrl-C: stop now
        finally:
            for child in self.children:
                child.kill()


@contextmanager
def launched(
    run: Path,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    num_workers: int = 1,
    page: bool = True,
    log_level: str = "WARNING",
    ready_within_s: float = 1800,
    on_event: Callable[[str], None] = lambda text: None,
) -> Iterator[Launched]:
    """Start all parts, wait until they are ready, and stop them on leaving the context.

    Args:
        config: a YAML file like ``configs/serve.yaml``.
        overrides: ``key=value`` settings.
        on_event: called with progress messages.

    Raises:
        UserError: a port is taken, or a part ended before it was ready.
    """
    settings = load_settings(config, overrides)
    given = load_secrets()
    # By default each launch generates a secret, so that no other user of this machine can register a worker.
    known = Secrets(given.api_keys, given.registration or secrets.token_urlsafe(32))
    for part in ("controller", "worker", *(("page",) if page else ())):
        check_exposure(part, getattr(settings, part).host, settings, known)
    parts = _ServeParts(run, config, overrides, settings, known.registration or "", log_level, num_workers)
    served = Launched([], parts.controller_url, [], None, parts.secret)
    previous = _raise_on_signals()
    try:
        served.children.append(parts.controller())
        for index in range(num_workers):
            child, url = parts.worker(index)
            served.children.append(child)
            served.worker_urls.append(url)
        if page:
            child, served.page_url = parts.page()
            served.children.append(child)
        _wait_until_ready(served, num_workers, ready_within_s, on_event)
        yield served
    finally:
        served.stop(settings.worker.drain_s + END_S + 3)
        for number, handler in previous.items():
            signal.signal(number, handler)


class _ServeParts:
    """Builds the command of each part."""

    def __init__(
        self,
        run: Path,
        config: Path | None,
        overrides: Sequence[str],
        settings: ServeSettings,
        secret: str,
        log_level: str,
        num_workers: int,
    ) -> None:
        self._run = run
        self._settings = settings
        self.secret = secret
        self._common = [*(["--config", str(config)] if config else []), *overrides]
        self._environment = os.environ | {
            SECRET_VARIABLE: secret,
            PARENT_VARIABLE: str(os.getpid()),
            LOG_LEVEL_VARIABLE: log_level,
        }
        if num_workers > 1:
            # By default each worker would start a thread for every core.
            threads = str(max(1, num_cores() // num_workers))
            self._environment.setdefault("OMP_NUM_THREADS", threads)
        own = settings.controller
        self._controller_port = _free_port("controller", own.host, own.port)
        self.controller_url = _url(own.host, self._controller_port)

    def controller(self) -> Child:
        arguments = ["controller", *self._common, f"controller.port={self._controller_port}"]
        return Child("controller", arguments, f"{self.controller_url}/healthz", self._environment)

    def worker(self, index: int) -> tuple[Child, str]:
        own = self._settings.worker
        port = _free_port("worker", own.host, own.port + index if own.port else 0)
        # Call a worker on this machine at the loopback address, whatever address it listens on.
        url = _url(own.host, port)
        own_settings = [f"worker.port={port}", f"worker.controller={self.controller_url}", f"worker.address={url}"]
        arguments = ["worker", str(self._run), *self._common, *own_settings]
        return Child(f"worker {index + 1}", arguments, f"{url}/readyz", self._environment), url

    def page(self) -> tuple[Child, str]:
        own = self._settings.page
        port = _free_port("page", own.host, own.port)
        url = _url(own.host, port)
        arguments = ["web", *self._common, f"page.port={port}", "--controller", self.controller_url]
        return Child("page", arguments, f"{url}/healthz", self._environment), url


def _free_port(part: str, host: str, port: int) -> int:
    """The port itself if it is free, or any free port for 0."""
    with bind(part, host, port) as sock:
        return int(sock.getsockname()[1])


def _url(host: str, port: int) -> str:
    host = "127.0.0.1" if host in WILDCARDS else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _raise_on_signals() -> dict[int, Any]:
    """Let SIGTERM and SIGHUP run ``finally`` blocks too. Only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return {number: signal.signal(number, leave) for number in numbers}


def _wait_until_ready(served: Launched, num_workers: int, within_s: float, on_event: Callable[[str], None]) -> None:
    deadline = time.monotonic() + within_s
    headers = {"Authorization": f"Bearer {served.secret}"}
    with httpx.Client(timeout=5, trust_env=False) as client:
        for child in served.children:
            on_event(f"waiting for {child.name}")
            while not _answers(client, child.ready_url):
                _check_alive(served, deadline)
                time.sleep(0.1)
        on_event("waiting for the workers to register")
        while True:
            response = client.get(f"{served.controller_url}/workers", headers=headers)
            if response.status_code == 200 and sum(not worker["failed"] for worker in response.json()) >= num_workers:
                return
            _check_alive(served, deadline)
            time.sleep(0.1)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code < 400
    except httpx.HTTPError:
        return False


def _check_alive(served: Launched, deadline: float) -> None:
    for child in served.children:
        if child.exit_status is not None:
            message = (
                f"{child.name} ended with status {child.exit_status} before it was ready; its messages above say why"
            )
            # The part's own exit status distinguishes bad input from a failure.
            is_bad_input = child.exit_status == DEFAULT_EXIT_STATUS
            raise UserError(message, code="invalid_input" if is_bad_input else "part_stopped")
    if time.monotonic() > deadline:
        raise UserError("the parts were not ready in time; `--verbose` shows their logs", code="part_stopped")
