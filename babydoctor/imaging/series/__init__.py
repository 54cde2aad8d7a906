"""Several image files -> series: what belongs together, in which order, and what a series may be called.

``read_facts`` reads one file's header, ``group_slices`` groups and sorts by these facts, ``series_label`` names a
group. Only ``isolation`` calls ``read_facts`` on files from outside.
"""

from __future__ import annotations

from babydoctor.imaging.series.facts import SliceFacts, hash_of, read_facts
from babydoctor.imaging.series.grouping import Order, SliceGroup, group_slices
from babydoctor.imaging.series.labels import series_label

__all__ = ["Order", "SliceFacts", "SliceGroup", "group_slices", "hash_of", "read_facts", "series_label"]
