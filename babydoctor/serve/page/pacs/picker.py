"""What the picker of one tab holds: results of the last search, and where the loaded image came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from babydoctor.serve.page.pacs.client import PacsClient, PacsInstance, PacsSeries, PacsStudy


@dataclass
class PacsPicker:
    """Patients' names and numbers are in ``studies`` only, and are deleted when an image has been loaded."""

    client: PacsClient | None = field(default=None, repr=False)
    studies: list[PacsStudy] = field(default_factory=list, repr=False)
    series: list[PacsSeries] = field(default_factory=list, repr=False)
    instances: list[PacsInstance] = field(default_factory=list)
    image: int = 0
    origin: object = None
    """The ``Scan`` that was loaded from here; another scan did not come from a PACS."""

    def forget_patients(self) -> None:
        """Drop everything that identifies somebody; the images of the chosen series stay within reach."""
        self.studies, self.series = [], []
