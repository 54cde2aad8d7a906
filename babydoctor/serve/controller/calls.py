"""Forward small requests to one worker: attention, token counts, properties of a model. ``relay`` forwards answers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import httpx
from pydantic import BaseModel

from babydoctor.serve.api.errors import ApiCode, ApiError, code_of_status, known_code
from babydoctor.serve.api.protocol import AttentionRequest
from babydoctor.serve.client import ATTENTION_PATH, read_messages
from babydoctor.serve.controller.fleet import Fleet
from babydoctor.serve.controller.registry import WorkerRecord
from babydoctor.serve.logs import log

logger = logging.getLogger(__name__)


class WorkerCalls:
    """Forwards requests to a worker of the model and returns its replies.

    Args:
        probe: schedules a check whether a worker is alive.
    """

    def __init__(self, fleet: Fleet, probe: Callable[[WorkerRecord], None]) -> None:
        self._fleet = fleet
        self._probe = probe

    def worker_for(self, model: str) -> WorkerRecord:
        """A worker that serves the model.

        Raises:
            ApiError: there is none.
        """
        record = self._fleet.registry.pick(model, time.monotonic())
        if record is None:
            raise self._fleet.no_worker(model)
        return record

    async def ask(self, model: str, path: str, body: BaseModel) -> dict[str, Any]:
        """A worker's reply to a small request.

        Raises:
            ApiError: the worker refused or did not answer.
        """
        record = self.worker_for(model)
        self._fleet.registry.begin(record)
        try:
            response = await self._fleet.client.post(
                record.url + path,
                content=body.model_dump_json(),
                headers=self._fleet.call_headers(record),
            )
            data = json.loads(response.content)
        except (httpx.TransportError, ValueError):
            raise self._no_answer(record) from None
        finally:
            self._fleet.registry.end(record)
        if response.status_code == 200 and isinstance(data, dict):
            return data
        raise _refusal(response, response.content)

    async def stream_attention(self, request: AttentionRequest) -> AsyncGenerator[dict[str, Any], None]:
        """A worker's progress messages and its reply. Closing the generator ends the work there.

        Raises:
            ApiError: the worker refused or did not answer.
        """
        record = self.worker_for(request.model)
        self._fleet.registry.begin(record)
        body = request.model_copy(update={"stream": True}).model_dump_json()
        has_replied = False
        try:
            async with self._fleet.client.stream(
                "POST", record.url + ATTENTION_PATH, content=body, headers=self._fleet.call_headers(record)
            ) as response:
                if response.status_code != 200:
                    raise _refusal(response, await response.aread())
                async with aclosing(read_messages(response)) as messages:
                    async for message in messages:
                        has_replied = "grid" in message
                        yield message
        except (httpx.TransportError, ValueError):
            raise self._no_answer(record) from None
        finally:
            self._fleet.registry.end(record)
        if not has_replied:
            raise self._no_answer(record)

    def _no_answer(self, record: WorkerRecord) -> ApiError:
        if is_probed := not record.failed:
            self._probe(record)
        log(logger, logging.WARNING, "worker did not answer", worker=record.worker_id, probed=is_probed)
        return ApiError("worker_lost", "The worker did not answer. Please try again soon.")


def _refusal(response: httpx.Response, content: bytes) -> ApiError:
    """The controller's error for a worker's error response."""
    try:
        data = json.loads(content)
    except ValueError:
        data = None
    error = data.get("error") if isinstance(data, dict) else None
    if not isinstance(error, dict) or response.status_code in (401, 403):
        code: ApiCode = "unsupported" if response.status_code == 404 else code_of_status(response.status_code)
        return ApiError(code, "The model's worker cannot answer this.")
    param = error.get("param")
    code = known_code(error.get("code"))
    return ApiError(code, str(error.get("message")), param=str(param) if param is not None else None)
