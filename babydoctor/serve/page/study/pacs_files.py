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
        kept: files of the loaded study, which are part of the new one, too.
    """

    def __init__(
        self, client: PacsClient, instances: Sequence[PacsInstance], num_stated: int, kept: Sequence[bytes] = ()
    ) -> None:
        self.client = client
        self._instances = tuple(instances)
        self._num_stated = num_stated
        self._kept = tuple(kept)

    @property
    def has_kept(self) -> bool:
        return bool(self._kept)

    def __len__(self) -> int:
        return len(self._kept) + self._num_stated

    def files(self) -> Iterator[bytes | Refused]:
        """The images.

        Raises:
            PageError: the PACS cannot be reached or refuses the request, or the series exceeds a limit of a study.
        """
        yield from self._kept
        num_bytes = sum(map(len, self._kept))
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
