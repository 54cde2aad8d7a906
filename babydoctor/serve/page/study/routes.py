"""HTTP routes of a study: uploads, and the link between two series."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from babydoctor.serve.page.session import Sessions
from babydoctor.serve.page.study.link import link_stacks
from babydoctor.serve.page.study.uploads import StudyUploads
from babydoctor.serve.page.texts import PageError

NO_STORE = {"cache-control": "no-store"}


def study_routes(uploads: StudyUploads, sessions: Sessions) -> APIRouter:
    """The routes. See ``uploads`` for their requests and replies."""
    router = APIRouter()

    @router.post("/page/study")
    async def files(request: Request) -> Response:
        try:
            source = await uploads.receive(request.stream())
        except PageError as error:
            return JSONResponse({"error": error.code}, headers=NO_STORE)
        return StreamingResponse(uploads.read(source), headers=NO_STORE, media_type="application/x-ndjson")

    @router.post("/page/study/{ticket}")
    async def ticket(ticket: str) -> Response:
        """Read the files of a waiting source, such as a series in a PACS."""
        try:
            source = uploads.sources.take(ticket)
        except PageError as error:
            return JSONResponse({"error": error.code}, headers=NO_STORE)
        return StreamingResponse(uploads.read(source), headers=NO_STORE, media_type="application/x-ndjson")

    @router.get("/page/link/{first}/{second}")
    def link(first: str, second: str) -> Any:
        scans = sessions.scan(first), sessions.scan(second)
        stacks = [scan.stack for scan in scans if scan is not None and scan.stack is not None]
        if len(stacks) < 2:
            return JSONResponse({"error": "session_lost"}, 404, NO_STORE)
        return JSONResponse(link_stacks(*stacks).to_json(), headers=NO_STORE)

    return router
