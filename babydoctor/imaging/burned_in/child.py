"""The process that reads text: ``python -m babydoctor.imaging.burned_in.child SOCKET NUM_THREADS``."""

from __future__ import annotations

import json
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

SEARCH_EDGE = 1024
"""Smaller pictures are enlarged to about this long edge, because letters of ten pixels are found at twice the size."""

MAX_ENLARGEMENT = 4
MAX_EDGE = 2000
"""Larger pictures are searched at this long edge."""


def serve(connection: Connection, num_threads: int) -> None:
    """Answer requests, each a JSON header and the pixels ``uint8 [H, W, 3]``, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = _load(num_threads)
    connection.send_bytes(b"{}")
    while True:
        try:
            header = json.loads(connection.recv_bytes())
            pixels = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(header["height"], header["width"], 3)
        except EOFError:
            return
        # The system ends this process when its CPU time is used up; onnxruntime cannot be interrupted otherwise.
        signal.setitimer(signal.ITIMER_PROF, header["seconds"])
        found = _read(engine, pixels)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(found).encode())


def _load(num_threads: int) -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": 0.0,  # ``kinds`` decides on uncertain text
            "Global.max_side_len": MAX_EDGE,
            "Global.use_cls": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": MAX_EDGE,
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def _read(engine: Any, pixels: np.ndarray) -> list[list[Any]]:
    """[left, top, right, bottom, text, score] of each text, in pixels of the picture ``[H, W, 3]``."""
    import cv2

    height, width = pixels.shape[:2]
    scale = min(MAX_ENLARGEMENT, SEARCH_EDGE / max(height, width), MAX_EDGE / max(height, width))
    searched = pixels[:, :, ::-1]  # RapidOCR takes BGR
    if scale > 1:
        searched = cv2.resize(searched, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    else:
        scale, searched = 1.0, np.ascontiguousarray(searched)
    result = engine(searched)
    if result.boxes is None:
        return []
    found = []
    for corners, text, score in zip(result.boxes, result.txts, result.scores, strict=True):
        (left, top), (right, bottom) = np.floor(corners.min(0) / scale), np.ceil(corners.max(0) / scale)
        edges = [max(0, left), max(0, top), min(width, right), min(height, bottom)]
        found.append([*map(int, edges), str(text), float(score)])
    return found


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
