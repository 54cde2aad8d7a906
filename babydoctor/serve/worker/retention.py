"""Store requests and answers on disk if the operator asks for it. Off by default.

The folder contains patients' data, so only its owner may read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babydoctor.schema import UserError


class Retention:
    """Appends to ``requests.jsonl`` in a folder. Each image is stored once, named by its SHA-256."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()
        try:
            (self._folder / "images").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
        except OSError as error:
            raise UserError(
                f"worker.retention_dir={folder}: cannot be written ({error.strerror}); choose another folder"
            ) from None

    def keep(self, request_id: str, prompt: str, images: Sequence[bytes], answer: str, **fields: Any) -> None:
        """Write one request and its answer."""
        digests = [hashlib.sha256(image).hexdigest() for image in images]
        for digest, image in zip(digests, images, strict=True):
            self._write(self._folder / "images" / digest, image, os.O_CREAT | os.O_EXCL)
        entry = {"time_s": time.time(), "request_id": request_id, "prompt": prompt, "images": digests, "answer": answer}
        line = json.dumps(entry | fields) + "\n"
        with self._lock:
            self._write(self._folder / "requests.jsonl", line.encode(), os.O_CREAT | os.O_APPEND)

    @staticmethod
    def _write(path: Path, data: bytes, flags: int) -> None:
        try:
            descriptor = os.open(path, flags | os.O_WRONLY, 0o600)
        except FileExistsError:
            return
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
