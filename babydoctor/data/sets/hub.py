"""Downloads that go on where they were cut off, and a message that helps where there is no network."""

from __future__ import annotations

from pathlib import Path

from babydoctor.schema import UserError


def download_hub_file(repo: str, file: str, folder: Path) -> Path:
    """Download one file of a data set on the Hugging Face hub into ``folder``; one that is there is not asked for."""
    target = folder / file
    if target.is_file():
        return target
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", local_dir=folder))
    except Exception as error:  # offline mode, network, missing repository, disk full: each has classes of its own
        raise UserError(
            f"{repo}/{file} could not be downloaded ({_first_line(error)}). By hand: get it from "
            f"https://huggingface.co/datasets/{repo}/resolve/main/{file} on a machine with a network, put it at "
            f"{target}, and run this again"
        ) from error


def download_hub_snapshot(repo: str, folder: Path) -> Path:
    """Download a whole data set repository into ``folder``; a folder with files in it is taken as it is."""
    done = folder / ".complete"
    if folder.is_dir() and (done.exists() or any(folder.glob("**/*.parquet")) or any(folder.glob("**/*.json"))):
        partly = (folder / ".cache").exists() and not done.exists()
        if not partly:
            return folder
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repo, repo_type="dataset", local_dir=folder)
    except Exception as error:  # as above
        raise UserError(
            f"{repo} could not be downloaded ({_first_line(error)}). By hand: get the files of "
            f"https://huggingface.co/datasets/{repo}/tree/main on a machine with a network, put them into "
            f"{folder}, and run this again"
        ) from error
    done.touch()
    return folder


def download_url(url: str, target: Path) -> Path:
    """Download a plain URL, going on where an earlier try was cut off (HTTP range); a file that is there is kept."""
    if target.is_file():
        return target
    import httpx

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=60) as response:
            if response.status_code == 416:  # nothing is left: the earlier try had all of it
                partial.replace(target)
                return target
            response.raise_for_status()
            if response.status_code != 206:  # this server does not continue files
                start = 0
            _write_response(response, partial, start, target.name)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise UserError(
            f"{url} could not be downloaded ({_first_line(error)}). By hand: download it on a machine with a network, "
            f"put it at {target}, and run this again"
        ) from error
    partial.replace(target)
    return target


def _write_response(response: object, partial: Path, start: int, name: str) -> None:
    import httpx
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    assert isinstance(response, httpx.Response)
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    written = start
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        partial.open("ab" if start else "wb") as file,
    ):
        task = progress.add_task(name, total=total, completed=start)
        for chunk in response.iter_raw():  # in the sizes that arrive: what is held back is lost when it is cut off
            file.write(chunk)
            written += len(chunk)
            progress.update(task, completed=written)
    if total is not None and written != total:
        raise OSError(f"cut off after {written:,} of {total:,} bytes")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
