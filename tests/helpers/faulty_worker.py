"""A real worker in which certain prompts simulate a bug: ``KILL`` ends its process, ``HANG`` stops its engine.

``python -m helpers.faulty_worker RUN PORT key=value ...``
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from babydoctor.serve.logs import set_up_logging
    from babydoctor.serve.server import bind, run_server
    from babydoctor.serve.settings import load_secrets, load_settings
    from babydoctor.serve.worker.app import build_worker_app, load_worker

    run, port, *overrides = sys.argv[1:]
    set_up_logging("worker")
    settings = load_settings(None, [f"worker.port={port}", "engine.max_running=4", *overrides])
    worker = load_worker(Path(run), settings)
    prepare, forward = worker._preprocessor.prepare, worker.engine.decoder.forward
    hanging: list[bool] = []

    def prepare_or_fail(request: Any) -> Any:
        if "KILL" in request.prompt:
            os._exit(139)
        if "HANG" in request.prompt:
            hanging.append(True)
        return prepare(request)

    def forward_or_hang(*args: Any, **kwargs: Any) -> Any:
        while hanging:
            time.sleep(0.05)
        return forward(*args, **kwargs)

    worker._preprocessor.prepare = prepare_or_fail  # type: ignore[method-assign]
    worker.engine.decoder.forward = forward_or_hang  # type: ignore[method-assign]
    sock = bind("worker", "127.0.0.1", int(port))
    address = f"http://127.0.0.1:{port}" if settings.worker.controller else None
    app = build_worker_app(worker, load_secrets(), address)
    run_server(app, sock, app.state.drain, drain_s=settings.worker.drain_s)


if __name__ == "__main__":
    main()
