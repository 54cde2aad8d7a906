"""Uploads from the browser, in memory for at most a minute until a session takes them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from typing import Generic, TypeVar

from fastapi import Request

from babydoctor.serve.page.texts import PageError

MAX_UPLOAD_BYTES = 128 * 2**20
"""Enough for a multi-frame DICOM file. The model receives one frame as a PNG."""

MAX_WAITING = 16
MAX_WAITING_BYTES = 2 * MAX_UPLOAD_BYTES
MAX_ARRIVING_BYTES = 2 * MAX_UPLOAD_BYTES
LIFE_S = 60.0
UPLOAD_S = 300.0
"""Time limit for one upload to arrive."""


Kept = TypeVar("Kept")


class Waiting(Generic[Kept]):
    """Items that are kept for about ``LIFE_S`` seconds and taken once. The oldest are dropped first if memory is short.

    Args:
        max_bytes: memory limit for all items.
        gone: code of the error for an item that no longer exists.
    """

    def __init__(self, max_bytes: int, gone: str) -> None:
        self._max_bytes, self._gone = max_bytes, gone
        self._kept: OrderedDict[str, tuple[float, int, Kept]] = OrderedDict()

    def put(self, thing: Kept, num_bytes: int = 0) -> str:
        """Keep an item. Returns a token for ``take``. ``num_bytes``: memory of the item."""
        self.drop_old()
        while self._kept and not self._has_room(num_bytes):
            self._kept.popitem(last=False)
        token = secrets.token_urlsafe(16)
        self._kept[token] = (time.monotonic(), num_bytes, thing)
        return token

    def take(self, token: str) -> Kept:
        """Remove and return an item. Raises ``PageError`` if it no longer exists."""
        if token not in self._kept:
            raise PageError(self._gone)
        return self._kept.pop(token)[2]

    def drop_old(self) -> None:
        """Delete items that were not taken in time."""
        oldest_s = time.monotonic() - LIFE_S
        for token in [token for token, (since_s, _, _) in self._kept.items() if since_s < oldest_s]:
            del self._kept[token]

    def _has_room(self, num_bytes: int) -> bool:
        total = sum(size for _, size, _ in self._kept.values())
        return len(self._kept) < MAX_WAITING and total + num_bytes <= self._max_bytes


class Uploads:
    """Uploaded files that no session has taken yet."""

    def __init__(self) -> None:
        self.waiting: Waiting[bytes] = Waiting(MAX_WAITING_BYTES, "upload_gone")
        self._num_arriving = 0

    async def read(self, request: Request) -> bytes:
        """Receive the body of an upload request. Concurrent uploads share ``MAX_ARRIVING_BYTES``.

        Raises:
            PageError: the body exceeds ``MAX_UPLOAD_BYTES``, concurrent uploads exceed their limit, the upload takes
                longer than ``UPLOAD_S``, or the connection broke.
        """
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self._receive(request, parts), UPLOAD_S)
        except PageError:
            raise
        except Exception:  # too slow, or the browser disconnected
            raise PageError("upload_broken") from None
        finally:
            self._num_arriving -= sum(map(len, parts))
        return b"".join(parts)

    async def _receive(self, request: Request, parts: list[bytes]) -> None:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            self._num_arriving += len(part)
            if size > MAX_UPLOAD_BYTES:
                raise PageError("upload_too_large")
            if self._num_arriving > MAX_ARRIVING_BYTES:
                raise PageError("uploads_busy")

    def put(self, data: bytes) -> str:
        """Keep a file. Returns a token for ``take``."""
        return self.waiting.put(data, len(data))

    def take(self, token: str) -> bytes:
        """Remove and return the file of a token. Raises ``PageError`` if it no longer exists."""
        return self.waiting.take(token)
