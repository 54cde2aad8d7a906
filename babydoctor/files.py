"""Atomic writes: a file or directory with its final name is complete and on disk.

Files are written under a temporary name, flushed to disk and renamed. A killed process leaves at most a temporary file
or directory, which ``remove_leftovers`` deletes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babydoctor.schema import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_TEMPORARY = re.compile(r"\..+\.(tmp|old)-\d+")

_NO_SPACE = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file exceeds the size limit of the process or the file system",
}


_NO_ACCESS = {
    errno.EACCES: "permission denied; give this user access (`ls -l` shows owner and mode, `chmod` changes the mode)",
    errno.EPERM: "the system does not permit this; choose a file or folder of this user",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EISDIR: "is a directory, not a file",
    errno.ENOTDIR: "is below a file, not below a directory",
    errno.ELOOP: "its symbolic links form a loop",
}


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to ``path`` if the block succeeds and deleted if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _apply_umask(temporary)
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            old = _temporary_name(path, "old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _apply_umask(directory: Path) -> None:
    """Give all files of a new directory the mode that the umask implies. The directory itself already has it.

    Some libraries write files with mode 0600 (safetensors, and everything that uses ``tempfile``) or with the mode of
    their source.
    """
    mode = directory.stat().st_mode
    for path in directory.rglob("*"):
        # A hard link shares its mode with a file elsewhere.
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(mode & 0o666)
        elif path.is_dir() and not path.is_symlink():
            path.chmod(mode & 0o7777)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. A failure leaves the old file as it was."""
    temporary = _temporary_name(path, "tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def split_lines(text: str) -> list[str]:
    """Lines that end with a newline, as JSON lines and tables have them.

    ``str.splitlines`` also breaks at U+2028, U+0085 and form feeds, which occur in users' texts.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if not lines[-1] else lines


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def remove_leftovers(directory: Path) -> list[str]:
    """Delete the temporary files and directories that killed processes left in ``directory``; returns their names.

    Use it only for directories that no other process writes to.
    """
    found = [path for path in directory.glob(".*") if _TEMPORARY.fullmatch(path.name)] if directory.is_dir() else []
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return sorted(path.name for path in found)


@contextlib.contextmanager
def explain_unreadable() -> Iterator[None]:
    """Turn an error of the system about access to a file into a ``UserError`` that names the file and the fix."""
    try:
        yield
    except OSError as error:
        reason = _NO_ACCESS.get(error.errno or 0)
        if reason is None or not error.filename:
            raise
        path = Path(os.fsdecode(error.filename))
        raise UserError(f"{path}: {reason}") from error


def check_readable(path: Path) -> None:
    """Raise ``UserError`` if a file cannot be opened, because not every library names the file and the reason."""
    with explain_unreadable():
        path.open("rb").close()


@contextlib.contextmanager
def explain_full_disk(what: str, directory: Path, hint: str) -> Iterator[None]:
    """Turn the error of a full disk into a ``UserError`` that names ``what``, the directory and the fix.

    Args:
        what: what is being written.
        hint: what to do after freeing space.
    """
    try:
        yield
    except Exception as error:
        reason = _full_disk_reason(error)
        if reason is None:
            raise
        # The file that could not be written may be elsewhere, for example in the directory for temporary files.
        path = Path(os.fsdecode(error.filename)) if isinstance(error, OSError) and error.filename else directory
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        raise UserError(
            f"{what} could not be written to {path}: {reason} ({free / 1e9:.2f} GB are free); {hint}"
        ) from error


def _full_disk_reason(error: Exception) -> str | None:
    """The reason if a write failed for lack of space, else None."""
    return _NO_SPACE.get(error.errno or 0) if isinstance(error, OSError) else None


def _temporary_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


class DirectoryLock:
    """Locks a directory for one process, with a POSIX lock on its file ``.lock``.

    The system releases the lock when the process ends, however it ends. Forked children do not inherit it, unlike
    ``flock``, so data loader workers that outlive a killed trainer for some seconds do not keep it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process holds it; the message names the process.
        """
        import fcntl  # POSIX only

        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                owner = os.read(file, 1000).decode(errors="replace").strip() or "another process"
                os.close(file)
                raise UserError(
                    f"{self.path.parent} is in use by {owner}; wait until it ends, stop it, or choose another directory"
                ) from None
            except OSError as error:
                logger.warning("%s cannot be locked (%s); make sure that no other process uses it", self.path, error)
            # The previous holder may have deleted the file between open and lock.
            if self.path.exists() and os.fstat(file).st_ino == self.path.stat().st_ino:
                self._file = file
            else:
                os.close(file)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Release the lock and delete its file."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
