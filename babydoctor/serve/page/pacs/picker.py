"""What the picker of one tab holds: the results of the last search."""

from __future__ import annotations

from dataclasses import dataclass, field

from babydoctor.serve.page.pacs.client import PacsClient, PacsSeries, PacsStudy


@dataclass
class PacsPicker:
    """Patients' names and numbers are in ``studies`` only, and are deleted when a series is chosen."""

    client: PacsClient | None = field(default=None, repr=False)
    studies: list[PacsStudy] = field(default_factory=list, repr=False)
    series: list[PacsSeries] = field(default_factory=list, repr=False)

    def forget_patients(self) -> None:
        """Drop everything that identifies somebody."""
        self.studies, self.series = [], []
