"""The Hugging Face hub: find and download a model's files, find their commit, and explain errors in one sentence.

Models go through the hub's own cache. Data sets are downloaded by ``data.sets.hub``.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from babydoctor.schema import UserError

Kind = Literal["model", "dataset"]

_TEXT_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHT_PATTERNS = ["*.safetensors", "*.bin"]
_DUPLICATES = {
    "model*.safetensors": ["pytorch_model*.bin", "pytorch_model*.bin.index.json"],
    "adapter_model.safetensors": ["adapter_model.bin"],
}
"""Files that repeat the weights of the files that match the key."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def model_directory(reference: str | Path, *, weights: bool = True) -> Path:
    """Return a directory unchanged, or the local copy of a model on the hub. Missing files are downloaded.

    Weights are downloaded as safetensors. ``.bin`` files are downloaded only if a repository has no safetensors.

    Args:
        weights: False downloads only the configuration and the tokenizer.

    Raises:
        UserError: ``reference`` is neither a directory nor a model that can be downloaded or is in the cache.
    """
    if Path(reference).is_dir():
        return Path(reference)
    from fnmatch import fnmatch

    from huggingface_hub import HfApi, snapshot_download

    repo = str(reference)
    allowed = _TEXT_PATTERNS + (_WEIGHT_PATTERNS if weights else [])
    ignored = ["*/*"]  # subfolders hold other formats of the same model
    try:
        names = HfApi().list_repo_files(repo)
        for pattern, duplicates in _DUPLICATES.items():
            if any(fnmatch(name, pattern) for name in names):
                ignored += duplicates
        return Path(snapshot_download(repo, allow_patterns=allowed, ignore_patterns=ignored))
    except Exception as error:  # the hub client raises many classes, for the hub, the network and the disk
        # The hub failed, so use the cache. Duplicates may never have been downloaded, so do not require them.
        ignored = ["*/*", *(name for duplicates in _DUPLICATES.values() for name in duplicates)]
        try:
            found = snapshot_download(repo, allow_patterns=allowed, ignore_patterns=ignored, local_files_only=True)
        except Exception:
            raise hub_error(error, repo) from error
        return Path(found)


def model_commit(reference: str) -> str | None:
    """The commit of a model in the hub's cache; None for a directory or a model that is not in the cache."""
    if Path(reference).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(reference, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def hub_error(error: BaseException, repo: str, *, kind: Kind = "model", file: str = "", hint: str = "") -> UserError:
    """Describe in one sentence what went wrong with a repository and how to fix it.

    Args:
        error: the exception of the hub client. The actual reason may be one of its causes.
        hint: another way to get the files, as a sentence.
    """
    name = f"{repo}/{file}" if file else repo
    text = f"{name}: {_reason(list(_causes(error)), repo, kind, file)}"
    return UserError(f"{text}. {hint}" if hint else text)


def data_set_error(error: BaseException, repo: str, *, hint: str) -> UserError:
    """``hub_error`` for errors of the ``datasets`` library. It drops their causes, so this asks the hub again."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(repo, repo_type="dataset")
    except Exception as refused:  # as in model_directory
        return hub_error(refused, repo, kind="dataset", hint=hint)
    return hub_error(error, repo, kind="dataset", hint=hint)


def _reason(causes: list[BaseException], repo: str, kind: Kind, file: str) -> str:
    from huggingface_hub import constants, errors

    def find(*classes: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, classes)), None)

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    what = "data set" if kind == "dataset" else "model"
    if full := next((cause for cause in causes if is_disk_full(cause)), None):
        return f"the disk is full ({full}); free some space and run this again"
    if find(errors.HFValidationError):
        return f"neither a directory here nor the id of a {what} on the hub (owner/name); check the path"
    if find(errors.GatedRepoError):
        return f"this {what} is gated; ask for access at {page}, then log in with `hf auth login`"
    answered = find(errors.HfHubHTTPError)
    status = answered.response.status_code if isinstance(answered, errors.HfHubHTTPError) else None
    if status == 401 and "Invalid credentials" in str(answered):
        return "the hub refused your access token; log in again with `hf auth login`"
    if status == 403:
        return f"your access token does not allow it; see its permissions at {constants.ENDPOINT}/settings/tokens"
    if find(errors.RepositoryNotFoundError) or status == 401:  # also the answer for private ones
        return (
            f"the hub has no {what} of this name, or it is private; check the spelling of {repo!r}, "
            "and log in with `hf auth login` if it is private"
        )
    if find(errors.RevisionNotFoundError):
        return f"this {what} has no such revision; see {page}"
    if find(errors.RemoteEntryNotFoundError):
        return f"this {what} has no file {file!r}; see {page}/tree/main"
    if find(errors.OfflineModeIsEnabled):
        return "not in the local cache, and HF_HUB_OFFLINE=1 forbids asking the hub; unset it or give a directory"
    if status is not None:
        return f"the hub answered {status} for {page}; try again later"
    last = causes[-1]
    return f"the download failed ({describe(last)}); check the network and run this again"


def is_disk_full(error: BaseException) -> bool:
    """True for the error of a full disk or an exhausted quota."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def disk_full_error(place: Path, needed: int | None = None) -> UserError:
    """The error for a full disk at ``place``, a file or folder that may not exist yet."""
    folder = next(parent for parent in (place, *place.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    wanted = f"{needed / 1e9:.1f} GB more are needed, but " if needed is not None else ""
    return UserError(
        f"{place}: {wanted}the disk has {free / 1e9:.1f} GB free; free some space and run this again to resume"
    )


def describe(error: BaseException) -> str:
    """The class and the first line of an error's message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
