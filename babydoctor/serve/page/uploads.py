"""Files on their way from the browser to a session: in memory only, and only for a minute."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict

from fastapi import Request

from babydoctor.serve.page.texts import PageError

MAX_UPLOAD_BYTES = 128 * 2**20
"""Room for a multi-frame DICOM file. The model gets one frame of it as a PNG."""

MAX_WAITING_UPLOADS = 16
MAX_WAITING_BYTES = 2 * MAX_UPLOAD_BYTES
MAX_ARRIVING_BYTES = 2 * MAX_UPLOAD_BYTES
UPLOAD_LIFE_S = 60.0
UPLOAD_S = 300.0
"""For one upload to arrive."""


class Uploads:
    """Uploaded files that no session has taken yet."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._num_arriving = 0

    async def read(self, request: Request) -> bytes:
        """The body of an upload request. All that arrive at the same time have ``MAX_ARRIVING_BYTES`` together.

        Raises:
            PageError: it is larger than ``MAX_UPLOAD_BYTES``, others fill the room, it takes longer than
                ``UPLOAD_S``, or the connection broke.
        """
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self._receive(request, parts), UPLOAD_S)
        except PageError:
            raise
        except Exception:  # too slow, or the browser has left
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
        """Keep a file for ``UPLOAD_LIFE_S`` seconds; the oldest make room. Returns a token for ``take``."""
        now_s = time.monotonic()
        for token in [token for token, (since_s, _) in self._waiting.items() if now_s - since_s > UPLOAD_LIFE_S]:
            del self._waiting[token]
        while self._waiting and not self._has_room(len(data)):
            self._waiting.popitem(last=False)
        token = secrets.token_urlsafe(16)
        self._waiting[token] = (now_s, data)
        return token

    def take(self, token: str) -> bytes:
        """The file of a token, once.

        Raises:
            PageError: the file is not there any more.
        """
        if token not in self._waiting:
            raise PageError("upload_gone")
        return self._waiting.pop(token)[1]

    def _has_room(self, num_bytes: int) -> bool:
        total = sum(len(data) for _, data in self._waiting.values())
        return len(self._waiting) < MAX_WAITING_UPLOADS and total + num_bytes <= MAX_WAITING_BYTES
