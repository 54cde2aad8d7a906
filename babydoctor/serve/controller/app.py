"""The controller's ASGI application, with the routes that only workers and LLaVA's clients call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from babydoctor.serve.api.application import build_application
from babydoctor.serve.api.docs import BODY_ERRORS, WORK_ERRORS, errors
from babydoctor.serve.api.protocol import FleetStatus, HeartBeat, ModelRequest, RegisterRequest
from babydoctor.serve.controller.controller import Controller
from babydoctor.serve.logs import log
from babydoctor.serve.settings import Secrets, ServeSettings

logger = logging.getLogger(__name__)

WORKER_PATHS = ("/register_worker", "/receive_heart_beat", "/unregister_worker")
"""Called by workers, which send the registration secret instead of a client's key."""


def build_controller_app(settings: ServeSettings, secrets: Secrets) -> FastAPI:
    """Build the controller's ASGI application."""
    controller = Controller(settings, secrets)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(controller.watch())
        yield
        watching.cancel()
        await controller.close()

    def add_own_routes(app: FastAPI) -> None:
        _add_worker_routes(app, controller)
        _add_client_routes(app, controller)

    return build_application(
        "BabyDoctor controller",
        controller,
        secrets,
        lifespan,
        host=settings.controller.host,
        add_own_routes=add_own_routes,
        drain=controller.drain,
        open_paths=WORKER_PATHS,
    )


def _add_worker_routes(app: FastAPI, controller: Controller) -> None:
    @app.post("/register_worker", tags=["workers"], responses=errors(*BODY_ERRORS, 403))
    async def register_worker(body: RegisterRequest, request: Request) -> None:
        """Register a worker. Needs the registration secret; if none is set, only from this machine."""
        url = controller.check_registrant(request, body.worker_name)
        await controller.register(url, body, knows_secret=controller.shows_secret(request))

    @app.post("/receive_heart_beat", tags=["workers"], responses=errors(*BODY_ERRORS, 403))
    async def receive_heart_beat(body: HeartBeat, request: Request) -> dict[str, bool]:
        """Receive a heartbeat. `exist` false: register again. `reachable` false: the controller cannot reach you."""
        url = controller.check_registrant(request, body.worker_name)
        record = controller.heart_beat(url, body.queue_length, body.draining)
        return {"exist": record is not None, "reachable": record is not None and not (record.failed or record.doubtful)}

    @app.post("/unregister_worker", tags=["workers"], responses=errors(*BODY_ERRORS, 403))
    async def unregister_worker(body: HeartBeat, request: Request) -> None:
        """Send no new requests to a worker. Its running answers continue."""
        record = controller.registry.records.get(controller.check_registrant(request, body.worker_name, leaving=True))
        if record is not None:
            record.status = record.status.model_copy(update={"draining": True})
            log(logger, logging.INFO, "worker drains", worker=record.worker_id)


def _add_client_routes(app: FastAPI, controller: Controller) -> None:
    @app.post("/refresh_all_workers", tags=["LLaVA"], responses=errors(401, 400, 408, 413, 422))
    async def refresh_all_workers() -> None:
        """Ask every worker for its status."""
        await controller.refresh()

    @app.post("/list_models", tags=["LLaVA"], responses=errors(401, 400, 408, 413, 422))
    async def list_models() -> dict[str, list[str]]:
        """The models that can answer now."""
        return {"models": controller.model_names()}

    @app.post("/get_worker_address", tags=["LLaVA"], responses=errors(*BODY_ERRORS))
    async def get_worker_address(body: ModelRequest) -> dict[str, str]:
        """The address of a worker for a model; empty if there is none."""
        record = controller.registry.pick(body.model, time.monotonic())
        if record is None:
            return {"address": ""}
        controller.registry.hand_out(record)
        return {"address": record.url}

    @app.post("/worker_get_status", tags=["LLaVA"], responses=errors(401, 400, 408, 413, 422))
    async def worker_get_status() -> FleetStatus:
        """The sum of all workers, in a worker's form, so that a controller can register with another controller."""
        return controller.status()

    @app.get("/workers", tags=["operators"], responses=errors(*(401, *WORK_ERRORS)))
    async def workers() -> list[dict[str, Any]]:
        """The workers, each with the id that the log uses."""
        return [
            {
                "id": record.worker_id,
                "address": record.url,
                "models": record.status.model_names,
                "load": record.load,
                "failed": record.failed,
                "draining": record.status.draining,
            }
            for record in controller.registry.records.values()
        ]
