"""The worker's side of the registry: register, send heartbeats, and register again after a controller restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx

from babydoctor.serve.api.errors import ApiCode
from babydoctor.serve.api.protocol import WorkerStatus
from babydoctor.serve.client import refusal_of
from babydoctor.serve.logs import log
from babydoctor.serve.settings import SECRET_VARIABLE

logger = logging.getLogger(__name__)

RETRY_S = 2.0
"""Seconds between attempts to register, because the controller may be starting."""


_UNREACHABLE = "controller cannot be reached"
_NOT_REACHED = "controller cannot reach this worker"
_ADDRESS_HINT = "set worker.address to a URL that the controller reaches, and worker.host=0.0.0.0 if it runs elsewhere"


class Registration:
    """Keeps a worker registered with its controller.

    Args:
        controller: URL of the controller.
        address: URL at which the controller reaches the worker.
        status: reads the worker's status.
        secret: the registration secret, if the controller needs one.
        heart_beat_s: seconds between heartbeats.
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
        """Register and send heartbeats until cancelled. Failures are logged once and retried."""
        is_registered = False
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            while True:
                is_registered = await (self._beat(client) if is_registered else self._register(client))
                await asyncio.sleep(self._heart_beat_s if is_registered else min(RETRY_S, self._heart_beat_s))

    async def leave(self) -> None:
        """Tell the controller to send no new requests. LLaVA's own controller does not know this call."""
        # Do not log an unreachable controller: when everything is stopped, it may have ended first.
        self._state = f"{_UNREACHABLE} "
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            await self._post(client, "/unregister_worker", self._heart_beat())

    async def _register(self, client: httpx.AsyncClient) -> bool:
        status = self._status().model_dump()
        body = {"worker_name": self._address, "check_heart_beat": True, "worker_status": status}
        response = await self._post(client, "/register_worker", body)
        if response is None:
            return False
        if response.status_code != 200:
            code = refusal_of(response).code
            hint = _hint(code, has_secret=bool(self._headers))
            self._note(logging.ERROR, "controller refuses this worker", code=code, hint=hint)
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
                    self._note(logging.ERROR, _NOT_REACHED, hint=_ADDRESS_HINT)
                else:
                    self._note(logging.INFO, "registered with the controller")
                return True
        except (ValueError, KeyError, TypeError):
            pass
        return await self._register(client)

    def _heart_beat(self) -> dict[str, object]:
        status = self._status()
        return {"worker_name": self._address, "queue_length": status.queue_length, "draining": status.draining}

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, object]) -> httpx.Response | None:
        try:
            return await client.post(self._controller + path, json=body, headers=self._headers)
        except httpx.HTTPError as error:
            self._note(logging.WARNING, _UNREACHABLE, reason=type(error).__name__)
            return None

    def _note(self, level: int, event: str, **fields: object) -> None:
        """Log a state only when it changes."""
        state = f"{event} {fields.get('code', '')}"
        if state != self._state:
            self._state = state
            log(logger, level, event, **fields)


def _hint(code: ApiCode, *, has_secret: bool) -> str:
    """What to set when a controller refuses the worker."""
    if code == "bad_secret":
        problem = "differs from the controller's" if has_secret else "is not set for this worker"
        return (
            f"{SECRET_VARIABLE} {problem}: set the same value for controller and worker. `babydoctor serve` "
            "generates a random secret at each start unless the variable is set"
        )
    if code in ("worker_unreachable", "bad_worker_name"):
        return _ADDRESS_HINT
    return "see the controller's log, and check that worker.controller is the URL of a controller"
