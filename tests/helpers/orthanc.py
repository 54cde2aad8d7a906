"""A real PACS for tests: Debian's Orthanc with its DICOMweb plugin, on loopback and with a password."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import requests

from helpers.serving import free_port, wait_until

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PROGRAM = shutil.which("Orthanc") or "/usr/sbin/Orthanc"


def has_orthanc() -> bool:
    return Path(PROGRAM).exists() and PLUGIN.exists()


needs_orthanc = pytest.mark.skipif(not has_orthanc(), reason="Debian's orthanc and orthanc-dicomweb are not installed")
CREDENTIALS = "reader:a-password-for-tests"


class Orthanc:
    """One server with an empty database in ``folder``."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        user, password = CREDENTIALS.split(":")
        self.url = f"http://127.0.0.1:{port}"
        self.dicomweb_url = f"{self.url}/dicom-web"
        self._auth = (user, password)
        settings = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {user: password},
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [PROGRAM, str(folder / "orthanc.json")], cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(lambda: self.get("/system") is not None, 60, "Orthanc")

    def get(self, path: str) -> requests.Response:
        response = requests.get(self.url + path, auth=self._auth, timeout=5)
        response.raise_for_status()
        return response

    def add(self, file: bytes) -> None:
        """Put a DICOM file into the archive."""
        requests.post(f"{self.url}/instances", data=file, auth=self._auth, timeout=10).raise_for_status()

    def files(self) -> list[bytes]:
        """Every file of the archive."""
        return [self.get(f"/instances/{key}/file").content for key in self.get("/instances").json()]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
