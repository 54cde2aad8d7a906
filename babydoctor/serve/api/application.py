"""Build the application of a worker or a controller: the shared routes behind ``middleware.Gate``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from babydoctor.serve.api.admission import Keys
from babydoctor.serve.api.backend import Backend
from babydoctor.serve.api.docs import OPEN_PATHS, build_app
from babydoctor.serve.api.middleware import Gate, add_error_handlers
from babydoctor.serve.api.origins import OriginCheck
from babydoctor.serve.api.routes import add_common_routes
from babydoctor.serve.settings import Secrets


def build_application(
    title: str,
    backend: Backend,
    secrets: Secrets,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    *,
    host: str,
    add_own_routes: Callable[[FastAPI], None],
    drain: Callable[[], Awaitable[None]],
    open_paths: Sequence[str] = (),
) -> FastAPI:
    """Build the ASGI application.

    Args:
        host: the address that the server listens on.
        drain: awaited on SIGTERM; kept as ``app.state.drain``.
        open_paths: answered without a client's key.
    """
    app = build_app(title, lifespan, has_keys=bool(secrets.api_keys))
    app.state.backend = backend
    app.state.drain = drain
    app.state.connections = backend.metrics.connections(backend.settings.limits)
    add_error_handlers(app)
    add_own_routes(app)
    add_common_routes(app, backend)
    # Controller and workers call each other with the registration secret.
    keys = (*secrets.api_keys, *([secrets.registration] if secrets.registration else ())) if secrets.api_keys else ()
    settings = backend.settings
    app.add_middleware(
        Gate,
        keys=Keys(keys),
        open_paths=(*OPEN_PATHS, *open_paths),
        limits=settings.limits,
        metrics=backend.metrics,
        origins=OriginCheck(host, settings.allowed_hosts, settings.cors_origins),
    )
    if settings.cors_origins:
        # Outside the gate: a browser's preflight request carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app
