"""The state of one browser tab: in memory only, and deleted some minutes after the tab is closed.

A tab is identified by a random token that the browser keeps across reloads. Gradio's session hash changes with each
reload, so ``Sessions`` maps hashes to tokens.
"""

from __future__ import annotations

import asyncio
import datetime
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from babydoctor.schema import IMAGE_TOKEN, Turn
from babydoctor.serve.page.conversation.running_map import RunningMap
from babydoctor.serve.page.pacs.picker import PacsPicker
from babydoctor.serve.page.scan import Scan, View
from babydoctor.serve.page.study.study import Study
from babydoctor.serve.page.texts import PageError

MAX_SESSIONS = 256
"""Largest number of sessions. Beyond it, the least recently used session is deleted."""

MAX_BYTES = 2**30
"""Limit on the images and views of all sessions. Beyond it, the least recently used session is deleted."""

KEEP_MIN = 15
"""Minutes that the session of a closed tab is kept."""

ABANDONED_S = 60.0
"""Seconds after the tab has gone until its running answer is stopped."""

_TOKEN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of one answer."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass
class Exchange:
    """A question, the view that was sent with it, and the answer so far."""

    question: str
    model: str
    sampling: AnswerSettings
    view: View
    image_name: str = ""
    prompt: str = ""
    turns: tuple[Turn, ...] = ()
    """The conversation that the model received, this question included."""
    answer: str = ""
    ended: str = ""
    """``stop``, ``length``, ``stopped`` (by the user) or ``error``; empty while the answer runs."""
    stop_requested: bool = False
    shown_s: float | None = None
    """When the whole answer was first shown (``time.monotonic``)."""
    certainty: dict[str, Any] = field(default_factory=dict)
    """Certainty measures that the API returned with the answer, see ``serve/api/certainty.py``."""
    asked_at: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    )

    @property
    def source(self) -> str:
        """The image, frame, window and model of the answer."""
        return " · ".join(part for part in (self.image_name, self.view.caption, f"model {self.model}") if part)


@dataclass
class Session:
    """One tab."""

    has_accepted: bool = False
    scan: Scan | None = None
    view: View | None = None
    study: Study | None = None
    """The study that ``scan`` belongs to."""
    num_images: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    earlier: list[Exchange] | None = None
    """The conversation before the last deletion or replacement, for one undo."""
    undo_note: str = ""
    """What was done to ``earlier``; shown next to "Undo"."""
    replaced: list[Exchange] = field(default_factory=list)
    """The exchanges that the running answer replaces. They come back if the question gets no answer."""
    editing: int | None = None
    """Index of the exchange whose question is being edited."""
    draft: str = ""
    """The text of the question box before the edit."""
    map: RunningMap | None = None
    overlay_note: str = ""
    words: list[tuple[str, np.ndarray]] = field(default_factory=list)
    """(word, weights ``[rows, columns]`` on the model's input) of the last answer. The first is the whole answer."""
    pacs: PacsPicker = field(default_factory=PacsPicker, repr=False)
    image_mode: str = "pad"
    problem: str = ""
    """Code of the error of the last answer, until it has been shown."""
    problem_retry_s: float | None = None
    missing_model: str = ""
    """The chosen model, if it is not running."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    """The task that receives the running answer, whether or not a browser is connected."""
    connections: set[str] = field(default_factory=set)
    left_at_s: float | None = None
    """Time at which the last connection was lost (``time.monotonic``)."""

    @property
    def last(self) -> Exchange | None:
        return self.exchanges[-1] if self.exchanges else None

    def last_answer(self) -> Exchange:
        """The last exchange. Raises ``PageError`` if it has no finished answer."""
        exchange = self.last
        if exchange is None or not exchange.answer:
            raise PageError("no_answer")
        if not exchange.ended:
            raise PageError("still_answering")
        return exchange

    @property
    def num_bytes(self) -> int:
        """Memory of the image and its views."""
        views = {id(each.view): each.view for each in [*self.exchanges, *(self.earlier or ()), *self.replaced]}
        if self.view is not None:
            views[id(self.view)] = self.view
        total = sum(len(view.png) + len(view.thumbnail) for view in views.values())
        total += self.study.num_bytes if self.study else 0
        return total + (self.scan.num_bytes if self.scan else 0)

    @property
    def scans(self) -> list[Scan]:
        """All images that the tab may show."""
        return [one.scan for one in self.study.series] if self.study else [self.scan] if self.scan else []

    @property
    def is_answering(self) -> bool:
        return self.last is not None and not self.last.ended

    @property
    def is_abandoned(self) -> bool:
        return self.left_at_s is not None and time.monotonic() - self.left_at_s > ABANDONED_S

    @property
    def image_name(self) -> str:
        """The name of the image under an answer. The file's own name is never known here."""
        if self.scan is None:
            return ""
        kind = self.scan.title or self.scan.label or str(self.scan.facts.get("modality") or "picture")
        return f"Image {self.num_images}: {kind}"

    def stop(self) -> None:
        """Request the running answer to stop."""
        for exchange in self.exchanges:
            exchange.stop_requested = True

    def load(self, scan: Scan) -> None:
        """Set a new image, which starts a new conversation."""
        self.start_over()
        self.scan, self.study = scan, None
        self.num_images += 1

    def start_over(self) -> None:
        """Delete the conversation and keep the image."""
        self.stop()
        self.cancel_map("")
        self.exchanges, self.replaced = [], []
        self.forget_earlier()
        self.editing = None
        self.words = []
        self.problem = ""

    def cancel_map(self, problem: str) -> None:
        """Cancel the map that is being computed. ``problem`` is the code of the message to the user."""
        if self.map is not None:
            self.map.cancel(problem)

    def keep_earlier(self, note: str) -> None:
        """Save the conversation for "Undo" before a part of it is deleted."""
        self.earlier, self.undo_note = list(self.exchanges), note

    def forget_earlier(self) -> None:
        self.earlier, self.undo_note = None, ""

    def turns(self, question: str) -> list[Turn]:
        """The conversation with one more question. The image is in the first question, as in training."""
        turns: list[Turn] = []
        for exchange in self.exchanges:
            if exchange.answer:
                turns += [Turn("user", exchange.question), Turn("assistant", exchange.answer.strip())]
        turns.append(Turn("user", question))
        turns[0] = Turn("user", f"{IMAGE_TOKEN}\n{turns[0].text}")
        return turns


class Sessions:
    """All tabs."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._tokens: OrderedDict[str, str] = OrderedDict()

    def attach(self, connection: str | None, token: str) -> Session:
        """Connect a page load with the session of its tab. Creates one if there is none.

        Args:
            connection: Gradio's session hash.
            token: 32 hexadecimal digits. Any other text creates a session that a reload cannot find again.
        """
        connection = connection or ""
        token = token if _TOKEN.fullmatch(token) else f"connection {connection}"
        self.delete_old()
        self._tokens[connection] = token
        while len(self._tokens) > 4 * MAX_SESSIONS:
            self._tokens.popitem(last=False)
        session = self._sessions.setdefault(token, Session())
        self._use(connection, token, session)
        while len(self._sessions) > MAX_SESSIONS:
            self._delete(next(iter(self._sessions)))
        return session

    def get(self, connection: str | None) -> Session:
        """The tab's session.

        Raises:
            PageError: the session no longer exists, so a request would not contain what the tab shows.
        """
        token = self._tokens.get(connection or "", "")
        session = self._sessions.get(token)
        if session is None:
            raise PageError("session_lost")
        self._use(connection or "", token, session)
        self._make_room()
        return session

    def accepted(self, connection: str | None) -> Session:
        """The session of a tab whose user has accepted the notice. Raises ``PageError`` as ``get`` does."""
        session = self.get(connection)
        if not session.has_accepted:
            raise PageError("session_lost")
        return session

    def scan(self, key: str) -> Scan | None:
        """The image with this key, if a tab whose user has accepted the notice still shows it."""
        scans = [scan for each in list(self._sessions.values()) if each.has_accepted for scan in each.scans]
        return next((scan for scan in scans if secrets.compare_digest(scan.key.encode(), key.encode())), None)

    def leave(self, connection: str | None) -> None:
        """Handle a tab that was closed, reloaded or disconnected. Its session is kept for ``KEEP_MIN`` minutes."""
        session = self._sessions.get(self._tokens.get(connection or "", ""))
        if session is not None:
            session.connections.discard(connection or "")
            if not session.connections:
                session.left_at_s = time.monotonic()
                session.cancel_map("map_left")
        self.delete_old()

    def delete_old(self) -> None:
        """Delete the sessions of tabs that were closed ``KEEP_MIN`` minutes ago."""
        oldest_s = time.monotonic() - KEEP_MIN * 60
        for key in [key for key, each in self._sessions.items() if (each.left_at_s or oldest_s) < oldest_s]:
            self._delete(key)

    def stop_all(self) -> None:
        """Stop all running answers and maps."""
        for session in self._sessions.values():
            session.stop()
            session.cancel_map("map_left")

    def __len__(self) -> int:
        return len(self._sessions)

    def _use(self, connection: str, token: str, session: Session) -> None:
        session.connections.add(connection)
        session.left_at_s = None
        self._sessions.move_to_end(token)

    def _make_room(self) -> None:
        """Delete the least recently used sessions until the rest fits, but never the last one."""
        total = sum(session.num_bytes for session in self._sessions.values())
        while total > MAX_BYTES and len(self._sessions) > 1:
            token, session = next(iter(self._sessions.items()))
            total -= session.num_bytes
            self._delete(token)

    def _delete(self, token: str) -> None:
        session = self._sessions.pop(token)
        session.stop()
        session.cancel_map("map_left")
