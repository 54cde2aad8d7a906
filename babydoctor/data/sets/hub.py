"""Download data sets. An interrupted download resumes where it stopped. Errors say what to do.

The hub's client discards a partial file when the connection breaks or the process ends, which can cost a day for a
27 GB archive. So the client only resolves the URL, and ``download_url`` fetches the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from babydoctor.data.sources import SOURCES_FILE, read_sources
from babydoctor.hub import describe, disk_full_error, hub_error, is_disk_full
from babydoctor.progress import progress_bars
from babydoctor.schema import UserError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

NUM_TRIES = 5
"""Consecutive tries that each received less than ``_MIN_GAIN`` bytes, after which a download fails."""

_MIN_GAIN = 1 << 20
_RETRY_WAIT_S = 1.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download_hub_file(repo: str, file: str, folder: Path) -> Path:
    """Download one file of a data set on the hub into ``folder``. An existing file is kept.

    Raises:
        UserError: the download failed; the message says why and how to continue.
    """
    target = folder / file
    if target.is_file():
        return target
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo, file, repo_type="dataset")
    hint = f"By hand: download {url} elsewhere, put it at {target}, and run this again"
    try:
        metadata = get_hf_file_metadata(url)
    except Exception as error:  # offline mode, network errors, missing and gated repositories have a class each
        raise hub_error(error, repo, kind="dataset", file=file, hint=hint) from error
    is_hub = urlsplit(metadata.location).netloc == urlsplit(constants.ENDPOINT).netloc
    download_url(
        metadata.location,
        target,
        headers=build_hf_headers() if is_hub else None,  # send the token to the hub only, not to its storage
        size=metadata.size,
        version=metadata.etag,
    )
    if metadata.commit_hash:
        record_source(folder, f"datasets/{repo}", metadata.commit_hash)
    return target


def download_hub_snapshot(repo: str, folder: Path) -> Path:
    """Download a whole (small) data set repository into ``folder``. A folder that has rows is used unchanged."""
    done = folder / ".complete"
    if folder.is_dir() and (done.exists() or any(folder.glob("**/*.parquet")) or any(folder.glob("**/*.json"))):
        is_partial = (folder / ".cache").exists() and not done.exists()
        if not is_partial:
            return folder
    from huggingface_hub import HfApi, constants, snapshot_download

    hint = (
        f"By hand: download the files of {constants.ENDPOINT}/datasets/{repo}/tree/main elsewhere, put them into "
        f"{folder}, and run this again"
    )
    try:
        commit = HfApi().dataset_info(repo).sha
        snapshot_download(repo, repo_type="dataset", local_dir=folder, revision=commit)
    except Exception as error:  # as above
        raise hub_error(error, repo, kind="dataset", hint=hint) from error
    if commit:
        record_source(folder, f"datasets/{repo}", commit)
    done.touch()
    return folder


def record_source(folder: Path, name: str, version: str) -> None:
    """Record the version of a published source of the files of ``folder`` in ``folder/sources.json``."""
    path = folder / SOURCES_FILE
    path.write_text(json.dumps({**read_sources(folder), name: version}, indent=1) + "\n", encoding="utf-8")


def copy_sources(source: Path, out: Path) -> None:
    """Copy ``sources.json`` from the downloaded files to the rows made from them."""
    for name, version in read_sources(source).items():
        record_source(out, name, version)


def download_url(
    url: str,
    target: Path,
    *,
    headers: dict[str, str] | None = None,
    size: int | None = None,
    version: str | None = None,
    sha1: str | None = None,
) -> Path:
    """Download ``url`` to ``target``, resuming from ``target.partial`` of an earlier try (HTTP range).

    An existing file is kept. A broken connection is resumed at once.

    Args:
        size: the expected number of bytes; None: the number that the server announces.
        version: the file's ETag. A partial file of another version is discarded. An ETag of 64 hex digits is the
            SHA-256 of the content, which is then checked. None: the server compares its own ETag (``If-Range``).
        sha1: SHA-1 of the content, if its publisher gives no SHA-256.

    Raises:
        UserError: the network, the server or the disk failed; the partial file is kept.
    """
    if target.is_file():
        return target
    import httpx

    by_hand = f"By hand: download it elsewhere, put it at {target}, and run this again"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _Partial(target, version)
        _fetch(url, partial, headers or {}, size)
        if version and _SHA256.fullmatch(version):
            _check_content(partial.path, "sha256", version, url)
        if sha1:
            _check_content(partial.path, "sha1", sha1, url)
        partial.finish()
    except httpx.HTTPStatusError as error:
        raise UserError(
            f"{url}: the server answered {error.response.status_code}; try again later. {by_hand}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"{url}: the download failed ({describe(error)}); run this again to resume. {by_hand}"
        ) from error
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(target) from error
        raise UserError(f"{target}: could not be written ({describe(error)})") from error
    return target


class _Partial:
    """A partial download: ``NAME.partial`` holds the first bytes, ``NAME.partial.version`` their version."""

    def __init__(self, target: Path, version: str | None) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self._version_path = target.with_name(target.name + ".partial.version")
        self.version = self._version_path.read_text(encoding="utf-8") if self._version_path.is_file() else None
        if version is not None and version != self.version:
            self.restart(version)

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def restart(self, version: str | None) -> None:
        """Discard the partial file and record the new version."""
        if self.path.is_file():
            self.path.unlink()
        self.version = version
        if version is None:
            self._version_path.unlink(missing_ok=True)
        else:
            self._version_path.write_text(version, encoding="utf-8")

    def finish(self) -> None:
        """Give the file its name."""
        self.path.replace(self.target)
        self._version_path.unlink(missing_ok=True)


def _fetch(url: str, partial: _Partial, headers: dict[str, str], size: int | None) -> None:
    """Append to ``partial`` until it is complete, reconnecting when the connection breaks."""
    import httpx

    tries = 0
    while size is None or partial.size < size:
        before = partial.size
        try:
            _fetch_once(url, partial, headers, size)
            return
        except httpx.TransportError as error:
            tries = 0 if partial.size - before >= _MIN_GAIN else tries + 1
            if tries >= NUM_TRIES or not (partial.size or before):
                raise
            logger.warning("%s: %s after %s bytes; continuing", url, describe(error), f"{partial.size:,}")
            time.sleep(_RETRY_WAIT_S)
    if partial.size != size:
        partial.restart(None)
        raise UserError(f"{url}: more than the published {size:,} bytes arrived; they were removed, run this again")


def _fetch_once(url: str, partial: _Partial, headers: dict[str, str], size: int | None) -> None:
    import httpx

    start = partial.size
    _check_encrypted(url)
    asked = {"Accept-Encoding": "identity", **headers}
    if start:
        asked["Range"] = f"bytes={start}-"
        if size is None and partial.version:  # the server's own ETag, so the server compares it
            asked["If-Range"] = partial.version
    with httpx.stream("GET", url, headers=asked, follow_redirects=True, timeout=60) as response:
        for step in (*response.history, response):
            _check_encrypted(str(step.url))
        if response.status_code == 416 and size is None:  # the earlier try received the whole file
            whole = response.headers.get("Content-Range", "").rpartition("/")[2]
            if whole in ("", "*", str(start)):
                return
            partial.restart(None)
            raise httpx.RemoteProtocolError(f"the server has {whole} bytes, but {start:,} were downloaded")
        response.raise_for_status()
        if start and response.status_code != 206:  # the server does not support ranges, or the file has changed
            start = 0
        if size is None and not start:
            etag = response.headers.get("ETag", "")
            partial.restart(etag if etag and not etag.startswith("W/") else None)
        length = response.headers.get("Content-Length")
        total = size if size is not None else start + int(length) if length else None
        if total is not None and total - start > shutil.disk_usage(partial.path.parent).free:
            raise disk_full_error(partial.target, total - start)
        _append(response, partial, start, total)


def _check_encrypted(url: str) -> None:
    """Refuse plain HTTP, also after a redirect, except to this machine."""
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"{url}: is not encrypted, so the data could be changed in transit; use an https address")


def _append(response: httpx.Response, partial: _Partial, start: int, total: int | None) -> None:
    import httpx

    written = start
    with progress_bars(in_bytes=True) as progress, partial.path.open("ab" if start else "wb", buffering=0) as file:
        task = progress.add_task(partial.target.name, total=total, completed=start)
        for chunk in response.iter_raw():  # unbuffered, because buffered data is lost when the process ends
            file.write(chunk)
            written += len(chunk)
            progress.update(task, completed=written)
    if total is not None and written < total:
        raise httpx.RemoteProtocolError(f"cut off after {written:,} of {total:,} bytes")


def _check_content(path: Path, algorithm: str, published: str, url: str) -> None:
    """Compare a downloaded file with its published checksum. Remove it if it differs."""
    hasher = hashlib.new(algorithm)
    with progress_bars(in_bytes=True) as progress, path.open("rb") as file:
        task = progress.add_task(f"checking {path.stem}", total=path.stat().st_size)
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
            progress.advance(task, len(chunk))
    if hasher.hexdigest() != published:
        path.unlink()
        raise UserError(
            f"{url}: the download is damaged (its {algorithm} begins with {hasher.hexdigest()[:12]}, published is "
            f"{published[:12]}); it was removed, run this again"
        )
