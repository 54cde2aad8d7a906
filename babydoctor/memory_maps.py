"""This process's memory mappings, read from ``/proc/self``. Nothing on other systems than Linux."""

from __future__ import annotations

import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HUGE_PAGE = 2 * 2**20

DENSE_SHARE = 7 / 8
"""Share of a huge page's small pages that must be in use for it to count as dense."""

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ \S+\s*(.*)$")


def dense_spans() -> Iterator[tuple[int, int]]:
    """Start and end of spans of whole huge pages, aligned, in private anonymous memory of which nearly all is in use.

    Mappings of less than two huge pages are left out.
    """
    for start, end, name, _ in _private_mappings():
        first, last = -(-start // HUGE_PAGE), end // HUGE_PAGE
        if end - start < 2 * HUGE_PAGE or last <= first or name not in ("", "[heap]"):
            continue
        is_dense = [share >= DENSE_SHARE for share in _shares_in_use(first * HUGE_PAGE, last - first)]
        page = first
        for dense, pages in itertools.groupby(is_dense):
            length = len(list(pages))
            if dense:
                yield page * HUGE_PAGE, (page + length) * HUGE_PAGE
            page += length


def _shares_in_use(start: int, count: int) -> list[float]:
    """For each of ``count`` huge pages from ``start`` on, the share of its small pages that are in memory."""
    per_page = HUGE_PAGE // mmap.PAGESIZE
    try:
        entries = np.fromfile("/proc/self/pagemap", "<u8", count * per_page, offset=start // mmap.PAGESIZE * 8)
    except OSError:
        return []
    present = entries[: len(entries) // per_page * per_page] >> 63  # bit 63: the page is in memory
    return present.reshape(-1, per_page).mean(axis=1).tolist()


def clean_weight_files() -> Iterator[tuple[int, int]]:
    """Start and end of the mappings of safetensors files in which no page was changed."""
    for start, end, name, sizes in _private_mappings():
        if name.endswith(".safetensors") and sizes["Anonymous"] == 0:
            yield start, end


def _private_mappings() -> Iterator[tuple[int, int, str, dict[str, int]]]:
    """Start, end, name and sizes in bytes of the private writable mappings of this process."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    found: tuple[int, int, str, dict[str, int]] | None = None
    for line in [*lines, "0-0 end"]:
        key, _, value = line.partition(":")
        if value.endswith("kB"):
            if found is not None:
                found[3][key] = int(value.split()[0]) * 1024
        elif "-" in key.split(" ", 1)[0]:
            if found is not None:
                yield found
            header = _MAPPING.match(line)
            found = (int(header[1], 16), int(header[2], 16), header[3], {}) if header else None
