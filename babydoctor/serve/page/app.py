"""``babydoctor web``: the web UI for clinicians, a Gradio app inside an ASGI application. Nothing is loaded remotely.

Uploads have their own route and stay in memory, because Gradio's upload writes files to disk. A content security policy
forbids browsers to load anything from other servers.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from babydoctor.serve.api.admission import Keys
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.origins import OriginCheck
from babydoctor.serve.connections import ConnectionLimits
from babydoctor.serve.page.gradio_routes import GradioRoutes
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.uploads import Uploads
from babydoctor.serve.settings import DicomWebServer, Limits

FOLDER = Path(__file__).parent

SWEEP_S = 30.0
"""How often the sessions of closed tabs are deleted."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio starts from inline scripts and builds templates at run time.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)


class PageGuard:
    """ASGI middleware: security headers on every response, the check of ``origins`` and, with keys, HTTP Basic sign-in.

    Args:
        keys: the password must be one of them; the user name is ignored. Empty: no sign-in.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, origins: OriginCheck) -> None:
        self.app = app
        self.keys = keys
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        try:
            self.origins.check(scope["headers"])
        except ApiError as error:
            return await JSONResponse(error.body(), error.status)(scope, receive, send_guarded)
        if self.keys and scope["path"] != "/healthz" and not self.keys.accepts(_basic_password(scope["headers"])):
            body = b"Sign in with your access key as the password; any user name will do."
            headers = [(b"www-authenticate", b'Basic realm="BabyDoctor"'), (b"content-type", b"text/plain")]
            await send_guarded({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self.app(scope, receive, send_guarded)


def _basic_password(headers: Sequence[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"authorization" and value[:6].lower() == b"basic ":
            try:
                return base64.b64decode(value[6:], validate=True).decode("utf-8").partition(":")[2]
            except ValueError:
                return ""
    return ""


def build_page_app(
    controller_url: str,
    *,
    api_key: str | None = None,
    sign_in_keys: Sequence[str] = (),
    feedback_file: Path | None = None,
    pacs: Sequence[DicomWebServer] = (),
    origins: OriginCheck | None = None,
) -> FastAPI:
    """The web UI as an ASGI application.

    Args:
        controller_url: URL of the controller.
        api_key: key for the controller.
        sign_in_keys: users must enter one of these keys. Empty: no sign-in.
        feedback_file: file that feedback is appended to, as JSON lines. None: no feedback form.
        pacs: PACS that users may load images from.
        origins: allowed origins. None: only this machine's own names.
    """
    import gradio as gr

    from babydoctor.serve.page.controller_client import ControllerClient
    from babydoctor.serve.page.events import WebUI
    from babydoctor.serve.page.layout import build_theme
    from babydoctor.serve.page.study.routes import study_routes
    from babydoctor.serve.page.viewer.routes import frame_routes

    uploads = Uploads()
    client = ControllerClient(controller_url, api_key)
    web_ui = WebUI(client, uploads, feedback_file, pacs)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            web_ui.sessions.delete_old()
            uploads.waiting.drop_old()
            web_ui.studies.drop_old()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(sweep())
        yield
        sweeping.cancel()
        await client.aclose()

    app = FastAPI(title="BabyDoctor web UI", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.web_ui = web_ui

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/page/upload")
    async def upload(request: Request) -> dict[str, str]:
        """Receive a file as the request body. The reply is its token, or the code of an error."""
        try:
            return {"token": uploads.put(await uploads.read(request))}
        except PageError as error:
            return {"error": error.code}

    app.mount("/page/static", StaticFiles(directory=FOLDER / "static"))
    app.include_router(frame_routes(web_ui.sessions))
    app.include_router(study_routes(web_ui.studies, web_ui.sessions))
    demo = web_ui.build()
    app = gr.mount_gradio_app(
        app,
        demo,
        path="/",
        theme=build_theme(),
        css_paths=[
            FOLDER / "static" / name
            for name in ("page.css", "viewer.css", "study.css", "certainty.css", "conversation.css", "layout.css")
        ],
        head='<link rel="stylesheet" href="page/static/frame.css">',
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        max_file_size=1,  # byte: Gradio's own upload route is not used
    )
    handlers = {number: function for number, function in demo.fns.items() if function.fn is not None}
    inputs = {number: [box.get_block_name() for box in function.inputs] for number, function in handlers.items()}
    app.add_middleware(GradioRoutes, inputs=inputs)
    app.add_middleware(PageGuard, keys=Keys(sign_in_keys), origins=origins or OriginCheck("127.0.0.1"))
    return app


def run_page(
    controller_url: str,
    host: str,
    port: int,
    *,
    origins: OriginCheck,
    limits: Limits,
    api_key: str | None = None,
    sign_in_keys: Sequence[str] = (),
    feedback_file: Path | None = None,
    pacs: Sequence[DicomWebServer] = (),
) -> None:
    """Serve the web UI until a signal arrives.

    Raises:
        UserError: the port is taken, or the host is not one of this machine's.
    """
    from babydoctor.serve.server import bind, run_server

    sock = bind("page", host, port)
    app: Any = build_page_app(
        controller_url,
        api_key=api_key,
        sign_in_keys=sign_in_keys,
        feedback_file=feedback_file,
        pacs=pacs,
        origins=origins,
    )

    async def drain() -> None:
        app.state.web_ui.sessions.stop_all()
        await asyncio.sleep(0.2)

    connections = ConnectionLimits(limits.max_connections, limits.head_timeout_s, limits.stall_timeout_s)
    run_server(app, sock, drain, connections=connections)
