"""A worker under uvicorn in a thread of the test, which needs no new process and no second import of torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from helpers.serving import free_port, wait_until


@contextlib.contextmanager
def serve_worker(run: Path, name: str) -> Iterator[str]:
    """Serve a run directory as model ``name`` without a controller; yields the URL."""
    import uvicorn

    from babydoctor.serve.settings import Secrets, load_settings
    from babydoctor.serve.worker.app import build_worker_app, load_worker

    settings = load_settings(None, [f"worker.model_name={name}", "worker.controller=null", "engine.max_running=4"])
    port = free_port()
    app = build_worker_app(load_worker(run, settings), Secrets(), None)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, what="the worker")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
