"""This process's memory mappings, read from ``/proc/self/smaps``. Nothing on other systems than Linux."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

HUGE_PAGE = 2 * 2**20

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ \S+\s*(.*)$")


def dense_mappings() -> Iterator[tuple[int, int]]:
    """Start and end of the private anonymous mappings of two huge pages or more that are mostly in use."""
    for start, end, name, sizes in _private_mappings():
        if end - start >= 2 * HUGE_PAGE and name in ("", "[heap]") and sizes["Rss"] * 4 > (end - start) * 3:
            yield start, end


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
