"""State of the picker of one tab: the results of the last search."""

from __future__ import annotations

from dataclasses import dataclass, field

from babydoctor.serve.page.pacs.client import PacsClient, PacsSeries, PacsStudy


@dataclass
class PacsPicker:
    """Patients' names and ids are only in ``studies`` and are deleted when a series is chosen."""

    client: PacsClient | None = field(default=None, repr=False)
    studies: list[PacsStudy] = field(default_factory=list, repr=False)
    series: list[PacsSeries] = field(default_factory=list, repr=False)

    def forget_patients(self) -> None:
        """Delete everything that identifies a patient."""
        self.studies, self.series = [], []
