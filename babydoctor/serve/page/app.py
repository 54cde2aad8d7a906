"""The page for clinicians: ``babydoctor web``. A Gradio application behind our own server, with everything local.

Uploads come in over a route of ours and stay in memory; Gradio's own would be written to a disk. Browsers are told by a
content security policy to load nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from babydoctor.serve.api.admission import Keys
from babydoctor.serve.page.errors import PageError

MAX_UPLOAD_BYTES = 128 * 2**20
"""A multi-frame DICOM file may be as large; what is sent to the model is one frame of it as a PNG."""

MAX_WAITING_UPLOADS = 16
UPLOAD_LIFE_S = 60.0

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


class Uploads:
    """Files on their way from the upload route to the session that asks for them, in memory."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def put(self, data: bytes) -> str:
        """Keep a file for a minute; returns the token under which it can be taken once."""
        now_s = time.monotonic()
        old = [token for token, (since_s, _) in self._waiting.items() if now_s - since_s > UPLOAD_LIFE_S]
        for token in old:
            del self._waiting[token]
        while len(self._waiting) >= MAX_WAITING_UPLOADS:
            self._waiting.popitem(last=False)
        token = secrets.token_urlsafe(16)
        self._waiting[token] = (now_s, data)
        return token

    def take(self, token: str) -> bytes:
        """Raises ``PageError`` where the file is not there any more."""
        if token not in self._waiting:
            raise PageError("upload_gone")
        return self._waiting.pop(token)[1]


class PageGuard:
    """ASGI middleware: security headers on every response and, where keys are given, HTTP Basic sign-in.

    Args:
        keys: one of them must be the password; the user's name does not matter. Empty: nobody is asked.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self.app = app
        self.keys = keys

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
) -> FastAPI:
    """The page as an ASGI application.

    Args:
        controller_url: where models are asked.
        api_key: what the controller wants to see.
        sign_in_keys: what users of the page must sign in with; none: it is open.
        feedback_file: JSON lines are appended there; None: the page takes no feedback.
    """
    # Read by Gradio when it is imported and when it starts.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Nothing of ours lands there; should Gradio ever write, then not where others read.
    folder = tempfile.TemporaryDirectory(prefix="babydoctor-page-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name

    import gradio as gr

    from babydoctor.serve.page.controller_client import ControllerClient
    from babydoctor.serve.page.page import Page
    from babydoctor.serve.page.style import CSS, HEAD, build_theme

    uploads = Uploads()
    client = ControllerClient(controller_url, api_key)
    page = Page(client, uploads, feedback_file)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()
        folder.cleanup()

    app = FastAPI(title="BabyDoctor page", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.page = page

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/page/upload")
    async def upload(request: Request) -> dict[str, str]:
        """Take a file as the body; answers with its token, or with the code of a sentence."""
        try:
            return {"token": uploads.put(await _read_upload(request))}
        except PageError as error:
            return {"error": error.code}

    demo = page.build()
    demo.queue(default_concurrency_limit=64)
    app = gr.mount_gradio_app(
        app,
        demo,
        path="/",
        theme=build_theme(),
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        max_file_size=1,  # Gradio's own upload route is not used
    )
    app.add_middleware(PageGuard, keys=Keys(sign_in_keys))
    return app


async def _read_upload(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MAX_UPLOAD_BYTES:
                raise PageError("upload_too_large")
            parts.append(part)
    except PageError:
        raise
    except Exception:  # the browser has left
        raise PageError("upload_broken") from None
    return b"".join(parts)


def run_page(
    controller_url: str,
    host: str,
    port: int,
    *,
    api_key: str | None = None,
    sign_in_keys: Sequence[str] = (),
    feedback_file: Path | None = None,
) -> None:
    """Serve the page until a signal comes.

    Raises:
        UserError: the port is taken, or the host is not one of this machine's.
    """
    from babydoctor.serve.server import bind, run_server

    sock = bind("page", host, port)
    app: Any = build_page_app(controller_url, api_key=api_key, sign_in_keys=sign_in_keys, feedback_file=feedback_file)

    async def drain() -> None:
        app.state.page.close()
        await asyncio.sleep(0.2)

    run_server(app, sock, drain)
