"""A worker's side of the registry: register, send heartbeats, register again where the controller forgot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx

from babydoctor.serve.api.protocol import WorkerStatus
from babydoctor.serve.logs import log

logger = logging.getLogger(__name__)

RETRY_S = 2.0
"""Between attempts to register: the controller may be starting."""


_UNREACHABLE = "controller cannot be reached"


class Registration:
    """Keeps a worker known to its controller.

    Args:
        controller: URL of the controller.
        address: URL under which the controller reaches the worker.
        status: reads the worker's status.
        secret: the registration secret, if the controller wants one.
    """

    def __init__(
        self, controller: str, address: str, status: Callable[[], WorkerStatus], secret: str | None, heart_beat_s: float
    ) -> None:
        self._controller = controller.rstrip("/")
        self._address = address
        self._status = status
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._heart_beat_s = heart_beat_s
        self._state = ""

    async def run(self) -> None:
        """Register and send heartbeats until cancelled. A failure is logged once and tried again."""
        is_registered = False
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            while True:
                is_registered = await (self._beat(client) if is_registered else self._register(client))
                await asyncio.sleep(self._heart_beat_s if is_registered else min(RETRY_S, self._heart_beat_s))

    async def leave(self) -> None:
        """Tell the controller that nothing new should come. An original controller does not know this call."""
        # Where everything is being stopped, the controller may be gone already.
        self._state = _UNREACHABLE
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            await self._post(client, "/unregister_worker", self._heart_beat())

    async def _register(self, client: httpx.AsyncClient) -> bool:
        status = self._status().model_dump()
        body = {"worker_name": self._address, "check_heart_beat": True, "worker_status": status}
        response = await self._post(client, "/register_worker", body)
        if response is None:
            return False
        if response.status_code != 200:
            self._note(logging.ERROR, "controller refuses this worker", status=response.status_code)
            return False
        self._note(logging.INFO, "registered with the controller")
        return True

    async def _beat(self, client: httpx.AsyncClient) -> bool:
        response = await self._post(client, "/receive_heart_beat", self._heart_beat())
        if response is None:
            return True
        try:
            answer = response.json()
            if response.status_code == 200 and answer["exist"]:
                if answer.get("reachable") is False:
                    self._note(logging.ERROR, "controller cannot reach this worker; check worker.address")
                else:
                    self._note(logging.INFO, "registered with the controller")
                return True
        except (ValueError, KeyError, TypeError):
            pass
        return await self._register(client)

    def _heart_beat(self) -> dict[str, object]:
        return {"worker_name": self._address, "queue_length": self._status().queue_length}

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, object]) -> httpx.Response | None:
        try:
            return await client.post(self._controller + path, json=body, headers=self._headers)
        except httpx.HTTPError as error:
            self._note(logging.WARNING, _UNREACHABLE, reason=type(error).__name__)
            return None

    def _note(self, level: int, event: str, **fields: object) -> None:
        """Log a state when it changes, not at every heartbeat."""
        if event != self._state:
            self._state = event
            log(logger, level, event, **fields)
