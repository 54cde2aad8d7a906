"""Run an application under uvicorn. The socket is bound first, and running answers may finish on shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from babydoctor.schema import UserError
from babydoctor.serve.connections import ConnectionLimits
from babydoctor.serve.settings import is_loopback

WILDCARDS = ("0.0.0.0", "::", "")

END_S = 25.0
"""Time to close connections and free the model after draining. Long enough for a busy machine."""

_END_NOW_S = 3.0


def bind(part: str, host: str, port: int) -> socket.socket:
    """Bind a listening socket; port 0 means any free port.

    Raises:
        UserError: the port is in use, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        fix = f"choose another with {part}.port=..." if error.errno == errno.EADDRINUSE else f"check {part}.host"
        raise UserError(f"{part} cannot listen on {host}:{port}: {error.strerror}; {fix}") from None
    sock.set_inheritable(False)
    return sock


def local_url(sock: socket.socket) -> str:
    """The URL of a bound socket for callers on this machine."""
    host, port = sock.getsockname()[:2]
    if host in WILDCARDS:
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def reachable_url(sock: socket.socket, caller: str) -> str:
    """The URL at which the caller reaches this socket. ``caller`` is the caller's URL.

    Raises:
        UserError: the socket accepts connections only from this machine and the caller is on another one.
    """
    host = str(sock.getsockname()[0])
    caller_host = urlsplit(caller).hostname or ""
    if is_loopback(caller_host):
        return local_url(sock)
    if is_loopback(host):
        raise UserError(
            f"the worker listens on {host}, which the controller at {caller} cannot reach; set worker.host=0.0.0.0, "
            "or worker.address=... if a proxy forwards to it"
        )
    if host in WILDCARDS:
        # Connecting a UDP socket sends nothing. It only finds which local address faces the controller.
        with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((caller_host, urlsplit(caller).port or 80))
                host = str(probe.getsockname()[0])
            except OSError as error:
                raise UserError(
                    f"worker.controller={caller} cannot be resolved ({error.strerror}); check it, or set worker.address"
                ) from None
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


class DrainingServer(uvicorn.Server):
    """A server that calls ``drain`` on the first SIGTERM or SIGINT and then stops. The second signal stops it at once.

    Without this, uvicorn would tell all streams immediately that their clients have disconnected.

    Args:
        end_within_s: the process ends this long after the first signal, even if a thread is stuck.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]], end_within_s: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._end_within_s = end_within_s
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        _end_within(self._end_within_s if self._draining is None else _END_NOW_S)
        if self._draining is not None or self._loop is None:
            self.should_exit = True
            self.force_exit = self._draining is not None
            return
        self._draining = self._loop.create_task(self._drain_and_stop())
        # A signal handler does not wake up the event loop, which may be waiting.
        self._loop.call_soon_threadsafe(lambda: None)

    async def _drain_and_stop(self) -> None:
        try:
            await self._drain()
        finally:
            _end_within(END_S)
            self.should_exit = True


def _end_within(seconds: float) -> None:
    """End this process after this time, whatever its threads wait for, and print their stacks first.

    The timer is a thread of C that needs no interpreter lock. A later call replaces an earlier one.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


def run_server(
    app: ASGIApp,
    sock: socket.socket,
    drain: Callable[[], Awaitable[None]],
    *,
    drain_s: float = 0,
    connections: ConnectionLimits | None = None,
) -> None:
    """Serve until a signal arrives and running answers are finished; ``drain`` takes at most ``drain_s``."""
    connections = connections or ConnectionLimits()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
        backlog=1024,
        ws="none",
        loop="asyncio",
        http=connections.protocol,  # type: ignore[arg-type]  # uvicorn calls it as it would the class
    )
    with contextlib.suppress(KeyboardInterrupt):
        DrainingServer(config, drain, drain_s + END_S).run(sockets=[sock])
