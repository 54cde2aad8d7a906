"""What the page remembers of one browser tab: in memory only, and gone when the tab is closed."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from babydoctor.schema import IMAGE_TOKEN, Turn
from babydoctor.serve.page.errors import PageError
from babydoctor.serve.page.scan import Scan, View

MAX_SESSIONS = 256
"""The tab that was used longest ago is forgotten beyond this number."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass
class Exchange:
    """A question, the view that was sent with it, and its answer so far."""

    question: str
    model: str
    sampling: Sampling
    view: View
    prompt: str = ""
    answer: str = ""
    ended: str = ""
    """``stop``, ``length``, ``stopped`` by the user, ``error``; empty while it runs."""
    note: str = ""
    stop_requested: bool = False
    asked_at: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    )


@dataclass
class Session:
    """One tab."""

    has_accepted: bool = False
    scan: Scan | None = None
    view: View | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    words: list[tuple[str, np.ndarray]] = field(default_factory=list)
    """(word, attention on the model's square ``[rows, columns]``) of the last answer; the first is the whole answer."""
    image_mode: str = "pad"

    @property
    def last(self) -> Exchange | None:
        return self.exchanges[-1] if self.exchanges else None

    def stop(self) -> None:
        """Ask the running answer to end."""
        for exchange in self.exchanges:
            exchange.stop_requested = True

    def start_over(self) -> None:
        """Forget the conversation; the image stays."""
        self.stop()
        self.exchanges = []
        self.words = []

    def turns(self, question: str) -> list[Turn]:
        """The conversation with one more question; the image stands in the first one, as in training."""
        turns: list[Turn] = []
        for exchange in self.exchanges:
            if exchange.answer:
                turns += [Turn("user", exchange.question), Turn("assistant", exchange.answer.strip())]
        turns.append(Turn("user", question))
        turns[0] = Turn("user", f"{IMAGE_TOKEN}\n{turns[0].text}")
        return turns


class Sessions:
    """All tabs, by Gradio's session hash."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def get(self, key: str | None) -> Session:
        """The tab's session; a new one where there is none."""
        key = key or ""
        session = self._sessions.setdefault(key, Session())
        self._sessions.move_to_end(key)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)[1].stop()
        return session

    def accepted(self, key: str | None) -> Session:
        """The session of a tab whose user has passed the gate.

        Raises:
            PageError: there is none any more: what the tab shows is not what we would send.
        """
        session = self.get(key)
        if not session.has_accepted:
            raise PageError("session_lost")
        return session

    def forget(self, key: str | None) -> None:
        """The tab was closed."""
        if (session := self._sessions.pop(key or "", None)) is not None:
            session.stop()

    def stop_all(self) -> None:
        """The page ends."""
        for session in self._sessions.values():
            session.stop()

    def __len__(self) -> int:
        return len(self._sessions)
