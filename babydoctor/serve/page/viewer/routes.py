"""The route of a frame before windowing, for the viewer's canvas: ``/page/frame/{key}/{frame}``."""

from __future__ import annotations

import threading

from fastapi import APIRouter, Response

from babydoctor.imaging.dicom.raw_frame import picture_block
from babydoctor.imaging.isolation import raw_frame
from babydoctor.schema import UserError
from babydoctor.serve.page.scan import Scan
from babydoctor.serve.page.session import Sessions
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.image_errors import dicom_error

MAX_AT_ONCE = 4
"""Frames that are prepared at the same time; others wait. A frame takes up to ``raw_frame.MAX_BYTES``."""


def frame_routes(sessions: Sessions) -> APIRouter:
    """The route. A scan's key is random, known only to the tab that loaded the scan, and invalid after the session."""
    router = APIRouter()
    turns = threading.BoundedSemaphore(MAX_AT_ONCE)

    @router.get("/page/frame/{key}/{frame}")
    def frame(key: str, frame: int) -> Response:
        scan = sessions.scan(key)
        # Keep frames out of the browser's disk cache.
        headers = {"cache-control": "no-store"}
        if scan is None or not 0 <= frame < scan.num_frames:
            sentence = PageError("session_lost" if scan is None else "bad_event").sentence
            return Response(sentence, 404, headers, "text/plain")
        try:
            with turns:
                return Response(_block(scan, frame), 200, headers, "application/octet-stream")
        except PageError as error:
            return Response(error.sentence, 422, headers, "text/plain")

    return router


def _block(scan: Scan, frame: int) -> bytes:
    try:
        if scan.dicom is None:
            assert scan.picture is not None
            return picture_block(scan.stack.picture(frame) if scan.stack is not None else scan.picture)
        return raw_frame(*(scan.stack.dicom(frame) if scan.stack is not None else (scan.dicom, frame)))
    except UserError as error:
        raise dicom_error(error) from None
