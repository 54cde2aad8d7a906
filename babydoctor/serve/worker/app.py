"""Load a worker's model and build its ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from babydoctor.serve.api.application import build_application
from babydoctor.serve.api.docs import BODY_ERRORS, errors
from babydoctor.serve.api.protocol import WorkerStatus
from babydoctor.serve.settings import Secrets, ServeSettings
from babydoctor.serve.worker.registration import Registration
from babydoctor.serve.worker.worker import Worker

if TYPE_CHECKING:
    from babydoctor.engine.settings import StartHook
    from babydoctor.serve.worker.upstream import UpstreamWorker


def load_worker(path: Path, settings: ServeSettings, *, on_start: StartHook | None = None) -> Worker:
    """Load a run directory and start an engine over it.

    Args:
        on_start: see ``EngineSettings``.

    Raises:
        UserError: the run, the device or a setting of the engine is not valid.
    """
    from babydoctor.conversation import get_template
    from babydoctor.data.template_tokens import end_token_ids
    from babydoctor.engine.engine import Engine
    from babydoctor.engine.settings import build_settings
    from babydoctor.model.run_dir import load_run
    from babydoctor.plan.hardware import choose_device

    device = settings.worker.device
    if device == "auto":
        device = choose_device(device)
    # Admission limits the queue before an image is decoded; the engine's own limit is higher.
    max_queue = max(256, settings.limits.max_queue)
    engine_settings = build_settings(settings.engine, max_queue=max_queue, on_start=on_start, own_weights=True)
    run = load_run(path, device=device)
    ends = end_token_ids(get_template(run.manifest.template), run.tokenizer)
    engine = Engine(run.model, run.tokenizer, engine_settings, template_ends=ends).start()
    name = settings.worker.model_name or path.resolve().name
    return Worker(run, engine, settings, name)


def build_worker_app(worker: Worker | UpstreamWorker, secrets: Secrets, address: str | None) -> FastAPI:
    """Build the worker's ASGI application.

    Args:
        address: the worker's URL, to register with the controller; None: do not register.
    """
    own = worker.settings.worker
    registration = None
    if own.controller and address:
        registration = Registration(own.controller, address, worker.status, secrets.registration, own.heart_beat_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        registering = asyncio.ensure_future(registration.run()) if registration else None
        yield
        if registering is not None:
            registering.cancel()
        worker.close()

    async def drain() -> None:
        worker.draining = True
        if registration is not None:
            await registration.leave()
        await worker.drain()

    def add_own_routes(app: FastAPI) -> None:
        @app.post("/worker_get_status", tags=["LLaVA"], responses=errors(*BODY_ERRORS))
        async def worker_get_status() -> WorkerStatus:
            """Models, speed and queue of this worker."""
            return worker.status()

    return build_application(
        "BabyDoctor worker", worker, secrets, lifespan, host=own.host, add_own_routes=add_own_routes, drain=drain
    )
