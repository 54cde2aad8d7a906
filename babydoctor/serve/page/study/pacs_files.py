"""The images of a series in a PACS as files of a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from babydoctor.serve.page.pacs.client import PacsClient, PacsInstance
from babydoctor.serve.page.study.archive import MAX_STUDY_BYTES, Refused
from babydoctor.serve.page.texts import PageError


class PacsFiles:
    """Fetches one image after the other.

    Args:
        num_stated: number of images in the series according to the PACS.
    """

    def __init__(self, client: PacsClient, instances: Sequence[PacsInstance], num_stated: int) -> None:
        self.client = client
        self._instances = tuple(instances)
        self._num_stated = num_stated

    def __len__(self) -> int:
        return self._num_stated

    def files(self) -> Iterator[bytes | Refused]:
        """The images.

        Raises:
            PageError: the PACS cannot be reached or refuses the request, or the series exceeds a limit of a study.
        """
        num_bytes = 0
        for instance in self._instances:
            try:
                data = self.client.fetch(instance)
            except PageError as error:
                if error.code != "upload_too_large":
                    raise
                yield Refused("too_large")
                continue
            num_bytes += len(data)
            if num_bytes > MAX_STUDY_BYTES:
                raise PageError("study_too_large")
            yield data
        for _ in range(self._num_stated - len(self._instances)):
            yield Refused("not_fetched")
