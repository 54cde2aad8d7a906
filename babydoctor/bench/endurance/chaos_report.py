"""The outcomes of an attack on servers, and which of them are faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

RIGHT = "right"
_FINE = {
    "answers": {RIGHT, "refused 429", "refused 503", "lost with its worker", "lost with the controller"},
    "hostile files": {"refused 422", "refused 413", "refused 429", "refused 503", "lost with the controller", RIGHT},
    "idle connections": {"closed"},
    "kills": {"worker", "controller", "frozen worker"},
}


@dataclass
class ChaosReport:
    """The outcomes: for each kind of event, how often it ended in which way."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in _FINE})
    restarts: int = 0
    seconds: float = 0.0
    seconds_to_recover: float = 0.0
    longest_s: float = 0.0
    left: list[str] = field(default_factory=list)
    """What was not restored at the end."""

    def faults(self) -> list[str]:
        """The faults as text; empty if there are none."""
        faults = [
            f"{kind}: {count} x {outcome}"
            for kind, counts in self.outcomes.items()
            for outcome, count in counts.items()
            if outcome not in _FINE[kind]
        ]
        if not self.outcomes["answers"][RIGHT]:
            faults.append("no question was answered")
        return faults + self.left

    def rows(self) -> list[tuple[str, int, str]]:
        """(Kind, number, how they ended) for a table."""
        return [
            (kind, sum(counts.values()), ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
            for kind, counts in self.outcomes.items()
        ]
