"""Limit a server's connections: their number, and how long a client may send nothing or read nothing.

uvicorn closes a connection that is idle after an answer. But it waits forever for the first request, for the rest of a
header, and for a client that does not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from uvicorn.protocols.http.h11_impl import H11Protocol

EndReason = Literal["idle", "half_sent", "not_reading", "crowded", "refused"]


@dataclass
class ConnectionLimits:
    """A server's limits for connections, and its open connections.

    Args:
        max_open: most open connections. A further one replaces the connection that has been idle longest, or is
            refused if none is idle.
        head_s: time to send the whole head of a request, from the start of the connection or the last answer.
        stall_s: time that a client may read nothing while the send buffer is full.
        on_end: called with the reason when a connection is closed.
    """

    max_open: int = 2048
    head_s: float = 10
    stall_s: float = 60
    on_end: Callable[[EndReason], None] = lambda reason: None
    open: dict[BoundedProtocol, None] = field(default_factory=dict, init=False)

    def protocol(self, **arguments: Any) -> BoundedProtocol:
        """Build a connection's protocol. This is the value for uvicorn's ``http``."""
        return BoundedProtocol(self, **arguments)


class BoundedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._has_data = False

    @property
    def is_idle(self) -> bool:
        """True if no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits = self._limits
        if len(limits.open) >= limits.max_open:
            idle = next((each for each in limits.open if each.is_idle), None)
            if idle is None:
                return self._end("refused")
            idle._end("crowded")
        limits.open[self] = None
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.open.pop(self, None)
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._has_data = True
        super().data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._has_data = False
        self._limits.open.pop(self, None)
        if not self.transport.is_closing():
            self._limits.open[self] = None  # the most recent of the idle connections
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._limits.stall_s, self._end, "not_reading")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _wait_for_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self._limits.head_s, self._on_head_time)

    def _on_head_time(self) -> None:
        if self.is_idle:
            has_half = self._has_data or self.conn.trailing_data[0]  # may have arrived with the previous request
            self._end("half_sent" if has_half else "idle")

    def _end(self, reason: EndReason) -> None:
        self._limits.open.pop(self, None)
        self._limits.on_end(reason)
        self.transport.abort()
