"""``babydoctor serve | controller | worker | web``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from babydoctor.serve.settings import Secrets, ServeSettings

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer evaluates this on Python 3.10)
    typer.Argument(metavar="[KEY=VALUE]...", help="settings, for example limits.max_queue=16"),
]
Config = Annotated[Optional[Path], typer.Option(help="YAML file like configs/serve.yaml")]  # noqa: UP045


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(serve)
    app.command()(controller)
    app.command()(worker)
    app.command()(web)


def serve(
    run: Annotated[Path, typer.Argument(help="run directory")],
    overrides: Overrides = None,
    config: Config = None,
    workers: Annotated[int, typer.Option(min=1, help="each holds a copy of the model")] = 1,
    page: Annotated[bool, typer.Option("--page/--no-page", help="the web UI for clinicians")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", help="show the complete logs of all parts")] = False,
) -> None:
    """Start controller, workers and web UI; stop all of them on Ctrl-C."""
    from rich.console import Console
    from rich.markup import escape

    from babydoctor.schema import UserError
    from babydoctor.serve.launch import launched
    from babydoctor.serve.settings import load_settings

    console = Console(highlight=False)
    name = load_settings(config, overrides or []).worker.model_name or run.resolve().name
    if not (run / "manifest.json").is_file():  # the worker checks the rest; this process does not import torch
        raise UserError(f"{run} is not a run directory: it has no manifest.json. `babydoctor train` writes one")
    level = "INFO" if verbose else "WARNING"
    with console.status("starting") as status:
        parts = launched(
            run,
            config=config,
            overrides=overrides or [],
            num_workers=workers,
            page=page,
            log_level=level,
            on_event=lambda text: status.update(escape(text)),
        )
        try:
            served = parts.__enter__()
        finally:
            status.stop()
    try:
        console.print(f"BabyDoctor serves [bold]{escape(name)}[/] (research use only)")
        if served.page_url:
            console.print(f"  page         {served.page_url}")
        console.print(f"  OpenAI API   {served.controller_url}/v1")
        console.print(f"  LLaVA API    {served.controller_url}")
        console.print(f"  API docs     {served.controller_url}/docs")
        console.print("Ctrl-C stops it.")
        served.supervise(lambda text: console.print(text, markup=False))
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        parts.__exit__(None, None, None)


def controller(overrides: Overrides = None, config: Config = None) -> None:
    """Run the controller alone."""
    settings, secrets = _begin("controller", config, overrides)

    from babydoctor.serve.controller.app import build_controller_app
    from babydoctor.serve.server import bind, run_server

    sock = bind("controller", settings.controller.host, settings.controller.port)
    app = build_controller_app(settings, secrets)
    run_server(app, sock, app.state.drain, drain_s=settings.worker.drain_s, connections=app.state.connections)


def worker(
    run: Annotated[Optional[Path], typer.Argument(help="run directory; none with --engine openai")] = None,  # noqa: UP045
    overrides: Overrides = None,
    config: Config = None,
    engine: Annotated[
        str, typer.Option(help="own, or openai: forward requests to an OpenAI-compatible server")
    ] = "own",
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="with --engine openai: its address, for example http://127.0.0.1:8000"),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="with --engine openai: the model's name there; default: the first"),
    ] = None,
    template: Annotated[str, typer.Option(help="with --engine openai: the model's template")] = "llava_llama_2",
) -> None:
    """Run one worker alone: a model behind HTTP."""
    from babydoctor.schema import UserError

    if engine not in ("own", "openai"):
        raise UserError(f"--engine {engine!r} is not own or openai")
    if engine == "openai" and run is not None:
        overrides, run = [str(run), *(overrides or [])], None  # there is no run, so the first argument is a setting
    settings, secrets = _begin("worker", config, overrides)

    from babydoctor.runtime import prepare_engine
    from babydoctor.serve.server import bind, reachable_url, run_server
    from babydoctor.serve.worker.app import build_worker_app, load_worker

    backend: Any
    if engine == "openai":
        from babydoctor.serve.worker.upstream import load_upstream

        if url is None:
            raise UserError("--engine openai needs --url, the address of the server, such as http://127.0.0.1:8000")
        backend = load_upstream(url, model, template, settings, os.environ.get("BABYDOCTOR_UPSTREAM_KEY"))
    elif run is None:
        raise UserError("worker needs a run directory (or --engine openai --url ADDRESS)")
    else:
        backend = load_worker(run, settings, on_start=prepare_engine)
    own = settings.worker
    sock = bind("worker", own.host, own.port)
    address = (own.address or reachable_url(sock, own.controller)) if own.controller else None
    app = build_worker_app(backend, secrets, address)
    run_server(app, sock, app.state.drain, drain_s=own.drain_s, connections=app.state.connections)


def web(
    overrides: Overrides = None,
    config: Config = None,
    controller_url: Annotated[
        str, typer.Option("--controller", help="URL of the controller")
    ] = "http://127.0.0.1:21001",
) -> None:
    """Run the web UI alone."""
    settings, secrets = _begin("page", config, overrides)

    from babydoctor.runtime import prepare_web_ui

    own = settings.page
    with prepare_web_ui():
        from babydoctor.serve.api.origins import OriginCheck
        from babydoctor.serve.page.app import run_page
        from babydoctor.serve.settings import is_loopback

        run_page(
            controller_url,
            own.host,
            own.port,
            origins=OriginCheck(own.host, settings.allowed_hosts, settings.cors_origins),
            limits=settings.limits,
            api_key=secrets.api_keys[0] if secrets.api_keys else None,
            # The web UI sends the controller's key for its users, so users on other machines must sign in with a key.
            sign_in_keys=() if is_loopback(own.host) else secrets.api_keys,
            feedback_file=Path(own.feedback_file) if own.feedback_file else None,
            pacs=own.dicomweb,
        )


def _begin(part: str, config: Path | None, overrides: list[str] | None) -> tuple[ServeSettings, Secrets]:
    """Prepare the process of a part: parent, logs, settings and secrets."""
    from babydoctor.runtime import die_with_parent
    from babydoctor.serve.logs import set_up_logging
    from babydoctor.serve.process import LOG_LEVEL_VARIABLE, PARENT_VARIABLE
    from babydoctor.serve.settings import check_exposure, load_secrets, load_settings

    die_with_parent(os.environ.get(PARENT_VARIABLE))
    set_up_logging(part, os.environ.get(LOG_LEVEL_VARIABLE, "INFO"))
    settings, secrets = load_settings(config, overrides or []), load_secrets()
    check_exposure(part, getattr(settings, part).host, settings, secrets)
    return settings, secrets
