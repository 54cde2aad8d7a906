"""Search, fetch and store by DICOMweb (PS3.18): QIDO-RS, WADO-RS and STOW-RS.

Patient identifiers go to the picker and are not logged. Fetched files are returned as bytes, because only the isolated
decoder may parse them.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from babydoctor.schema import UserError
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.uploads import MAX_UPLOAD_BYTES
from babydoctor.serve.settings import DicomWebServer

if TYPE_CHECKING:
    import requests
    from pydicom.dataset import Dataset

MAX_RESULTS = 50
MAX_SERIES = 100
MAX_INSTANCES = 2000

_DATE = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)")
_UID = re.compile(r"[0-9.]{1,64}")
_BOUNDARY = re.compile(r'boundary="?([^";]+)"?', re.IGNORECASE)


@dataclass(frozen=True)
class StudyQuery:
    """Search terms, at least one of them. ``date`` is ``YYYY-MM-DD`` or ``YYYY-MM-DD to YYYY-MM-DD``."""

    patient_id: str = field(default="", repr=False)
    accession: str = field(default="", repr=False)
    date: str = ""

    def filters(self) -> dict[str, str]:
        """QIDO-RS parameters.

        Raises:
            PageError: all fields are empty, or the date is malformed.
        """
        values = {"PatientID": self.patient_id.strip(), "AccessionNumber": self.accession.strip()}
        filters = {key: value for key, value in values.items() if value}
        if any(set(value) & set("*?\\") for value in filters.values()):
            raise PageError("pacs_wildcard")
        if self.date.strip():
            dates = [_to_dicom_date(part) for part in self.date.split("to")]
            if len(dates) > 2:
                raise PageError("pacs_date")
            filters["StudyDate"] = "-".join(dates)
        if not filters:
            raise PageError("pacs_no_query")
        return filters


@dataclass(frozen=True)
class PacsStudy:
    """A study in the picker. ``patient`` and ``description`` may identify a person."""

    uid: str
    date: str
    modalities: str
    patient: str = field(default="", repr=False)
    description: str = field(default="", repr=False)


@dataclass(frozen=True)
class PacsSeries:
    """A series in the picker."""

    study_uid: str
    uid: str
    modality: str
    number: str
    num_instances: int
    description: str = field(default="", repr=False)


@dataclass(frozen=True)
class PacsInstance:
    """An image in a PACS."""

    study_uid: str
    series_uid: str
    uid: str


class PacsClient:
    """One PACS. Its methods block for up to the server's ``timeout_s`` and may run in any thread.

    Every method raises ``PageError`` with a code ``pacs_...`` if the server cannot be reached, refuses the request, or
    answers with anything but DICOMweb.
    """

    def __init__(self, server: DicomWebServer, environment: Mapping[str, str] | None = None) -> None:
        needed = ("dicomweb_client", "highdicom") if server.write_back else ("dicomweb_client",)
        if any(importlib.util.find_spec(name) is None for name in needed):
            raise UserError(f"page.dicomweb ({server.name}) needs the extra pacs: pip install 'babydoctor[pacs]'")
        self.server = server
        self._credentials = (os.environ if environment is None else environment).get(server.credentials_variable)

    def search(self, query: StudyQuery) -> list[PacsStudy]:
        """Studies that match, newest first, at most ``MAX_RESULTS``."""
        filters = query.filters()
        fields = ["StudyDescription", "ModalitiesInStudy"]
        found = self._ask(
            lambda client: client.search_for_studies(fields=fields, limit=MAX_RESULTS, search_filters=filters)
        )
        studies = [
            PacsStudy(
                uid=_uid(item, "0020000D"),
                date=_day(item, "00080020"),
                modalities=_text(item, "00080061"),
                patient=" · ".join(filter(None, (_text(item, "00100010"), _text(item, "00100020")))),
                description=_text(item, "00081030"),
            )
            for item in found
        ]
        return sorted((study for study in studies if study.uid), key=lambda study: study.date, reverse=True)

    def series(self, study: PacsStudy) -> list[PacsSeries]:
        """The series of a study that may contain images, in order of their numbers."""
        fields = ["SeriesDescription", "NumberOfSeriesRelatedInstances", "SeriesNumber", "Modality"]
        found = self._ask(lambda client: client.search_for_series(study.uid, fields=fields, limit=MAX_SERIES))
        series = [
            PacsSeries(
                study_uid=study.uid,
                uid=_uid(item, "0020000E"),
                modality=_text(item, "00080060"),
                number=_text(item, "00200011"),
                num_instances=_number(item, "00201209"),
                description=_text(item, "0008103E"),
            )
            for item in found
        ]
        with_images = [one for one in series if one.uid and one.modality not in ("SR", "PR", "KO", "DOC", "RTPLAN")]
        return sorted(
            with_images, key=lambda one: (int(one.number) if one.number.lstrip("-").isdecimal() else 0, one.uid)
        )

    def instances(self, series: PacsSeries) -> list[PacsInstance]:
        """The images of a series, in order of their numbers."""
        found = self._ask(
            lambda client: client.search_for_instances(
                series.study_uid, series.uid, fields=["InstanceNumber"], limit=MAX_INSTANCES
            )
        )
        ordered = sorted(found, key=lambda item: (_number(item, "00200013"), _uid(item, "00080018")))
        uids = filter(None, (_uid(item, "00080018") for item in ordered))
        return [PacsInstance(series.study_uid, series.uid, uid) for uid in uids]

    def fetch(self, instance: PacsInstance) -> bytes:
        """The bytes of a DICOM file, at most ``MAX_UPLOAD_BYTES``."""
        url = f"{self._root}/studies/{instance.study_uid}/series/{instance.series_uid}/instances/{instance.uid}"
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'

        def get(client: Any) -> bytes:
            # dicomweb-client would parse the file in this process, without a size limit.
            with (
                self._session() as session,
                session.get(
                    url, headers={"Accept": accept}, stream=True, timeout=self.server.timeout_s, allow_redirects=False
                ) as response,
            ):
                response.raise_for_status()
                content = bytearray()
                for piece in response.iter_content(2**20):
                    content += piece
                    if len(content) > MAX_UPLOAD_BYTES + 2**16:
                        raise PageError("upload_too_large", limit_mb=MAX_UPLOAD_BYTES // 2**20)
                return first_part(bytes(content), response.headers.get("Content-Type", ""))

        return self._ask(get)

    def store(self, report: Dataset) -> None:
        """Store a data set by STOW-RS."""
        answer = self._ask(lambda client: client.store_instances([report]))
        if answer.get("FailedSOPSequence"):
            raise PageError("pacs_refused")

    @property
    def _root(self) -> str:
        return self.server.url.rstrip("/")

    def _session(self) -> requests.Session:
        import requests
        from dicomweb_client.session_utils import create_session_from_user_pass

        user, colon, password = (self._credentials or "").partition(":")
        session = create_session_from_user_pass(user, password) if colon else requests.Session()
        if user and not colon:
            session.headers["Authorization"] = f"Bearer {user}"
        session.verify = self.server.ca_file or True
        session.trust_env = False  # use neither a proxy nor ~/.netrc of the user who runs the server
        return session

    def _ask(self, call: Any) -> Any:
        import requests
        from dicomweb_client.api import DICOMwebClient

        try:
            with self._session() as session:
                client = DICOMwebClient(self._root, session=session, timeout=self.server.timeout_s)
                client.set_http_retry_params(retry=False)  # the default retries last a minute
                return call(client)
        except PageError:
            raise
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            raise PageError("pacs_credentials" if status in (401, 403) else "pacs_refused") from None
        except requests.RequestException:
            raise PageError("pacs_unreachable") from None
        except Exception:  # the answer is not DICOMweb; its text may contain a name
            raise PageError("pacs_not_dicomweb") from None


def first_part(content: bytes, content_type: str) -> bytes:
    """The first part of a multipart message (RFC 2046), or the content itself if it is not multipart.

    Raises:
        PageError: the message is damaged.
    """
    if not content_type.lower().startswith("multipart/"):
        return content
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise PageError("pacs_not_dicomweb")
    delimiter = b"--" + boundary[1].encode()
    begin = content.find(b"\r\n\r\n", content.find(delimiter))
    end = content.find(b"\r\n" + delimiter, begin)
    if begin < 0 or end < 0:
        raise PageError("pacs_not_dicomweb")
    return content[begin + 4 : end]


def _to_dicom_date(text: str) -> str:
    found = _DATE.fullmatch(text.strip())
    try:
        day = datetime.date(*map(int, found.groups())) if found else None
    except ValueError:
        day = None
    if day is None:
        raise PageError("pacs_date")
    return day.strftime("%Y%m%d")


def _text(item: Mapping[str, Any], tag: str) -> str:
    """An attribute of DICOM JSON (PS3.18 F.2) as text."""
    values = item.get(tag, {}).get("Value") or []
    names = [value.get("Alphabetic", "") if isinstance(value, dict) else str(value) for value in values]
    return ", ".join(names)[:200]


def _day(item: Mapping[str, Any], tag: str) -> str:
    """A DICOM date as YYYY-MM-DD; any other text unchanged."""
    text = _text(item, tag)
    found = _DATE.fullmatch(text)
    return "-".join(found.groups()) if found else text


def _uid(item: Mapping[str, Any], tag: str) -> str:
    """A valid UID, safe to put into a URL; empty for anything else."""
    text = _text(item, tag)
    return text if _UID.fullmatch(text) else ""


def _number(item: Mapping[str, Any], tag: str) -> int:
    text = _text(item, tag)
    return int(text) if text.lstrip("-").isdecimal() else 0
