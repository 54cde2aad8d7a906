"""Logs as one JSON object per line on stderr, without personal data.

No prompt, answer, image, key or address is logged. Records are built from named fields. An exception is logged as its
type and stack frames, without its message, which may quote a request.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
import traceback
import uuid
from typing import Any

REQUEST_ID: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Libraries whose records quote URLs, addresses or bodies; their warnings are logged without the text.
_FOREIGN = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "httpx", "httpcore", "fastapi")


def new_request_id(proposed: str | None = None) -> str:
    """The client's own id if it is short and plain, else a new one."""
    return proposed if proposed and _SAFE_ID.fullmatch(proposed) else uuid.uuid4().hex


class JsonFormatter(logging.Formatter):
    """Records -> JSON. ``event`` is the message of BabyDoctor's own records, and only the logger of others."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def format(self, record: logging.LogRecord) -> str:
        is_ours = record.name.startswith("babydoctor")
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "part": self.part,
            "event": record.getMessage() if is_ours else _foreign_event(record),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            entry["request_id"] = request_id
        entry |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            entry |= describe_exception(record.exc_info[1])
        return json.dumps(entry)


def _foreign_event(record: logging.LogRecord) -> str:
    """uvicorn's fixed message without its arguments. Messages of others may quote a request, so they are omitted."""
    if record.name == "uvicorn.error" and isinstance(record.msg, str):
        return f"uvicorn: {record.msg.strip().partition(chr(10))[0]}"  # a traceback's last line may quote a request
    return f"{record.name} reported"


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Type and stack of an exception, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [f"{frame.filename.rsplit('/', 2)[-2:]}".strip("[]").replace("', '", "/").strip("'") for frame in frames]
    stack = [f"{file}:{frame.lineno} {frame.name}" for file, frame in zip(files, frames, strict=True)]
    return {"exception": type(error).__name__, "stack": stack[-12:]}


class RateLimit(logging.Filter):
    """Passes at most ``burst`` records of one event at once, and ``per_s`` per second after that.

    The next record that passes carries the number of omitted ones. So an attack fills neither the disk nor the event
    loop.
    """

    def __init__(self, per_s: float = 20, burst: int = 200) -> None:
        super().__init__()
        self._per_s, self._burst = per_s, burst
        self._left: dict[str, tuple[float, float, int]] = {}
        """Event -> (records that may still pass, when that was counted, records left out since)."""

    def filter(self, record: logging.LogRecord) -> bool:
        key = f"{record.name} {record.levelno} {str(record.msg)[:80]}"
        if key not in self._left and len(self._left) >= 1000:
            self._left.clear()  # our events are a few dozen; other libraries may put anything into a message
        allowance, counted_s, num_left_out = self._left.get(key, (float(self._burst), record.created, 0))
        allowance = min(self._burst, allowance + max(0.0, record.created - counted_s) * self._per_s)
        if allowance < 1:
            self._left[key] = (allowance, record.created, num_left_out + 1)
            return False
        if num_left_out:
            record.fields = {**getattr(record, "fields", {}), "left_out": num_left_out}
        self._left[key] = (allowance - 1, record.created, 0)
        return True


def set_up_logging(part: str, level: str = "INFO") -> None:
    """Send all logs of this process to stderr as JSON. Called once, by the command that runs a part."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(part))
    handler.addFilter(RateLimit())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("babydoctor").setLevel(level)
    for name in _FOREIGN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def log(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log an event with named fields."""
    logger.log(level, event, extra={"fields": fields})
