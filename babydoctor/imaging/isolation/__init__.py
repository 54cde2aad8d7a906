"""Decode images in separate processes, so that a file that crashes, hangs or exhausts memory fails only its request.

``load_image``, ``load_pixels``, ``raw_frame``, ``read_facts`` and ``render`` do the same as the functions of these
names elsewhere, in one of a few processes that are replaced when they die. Each request has limits of
CPU seconds, address space and pixels (``limits.DecodeLimits``). The header gives the size before anything is decoded,
so large images wait until all requests together stay within a memory budget.

The protocol (``process`` and ``child``): request and file are sent to the process through a socket. For a large image,
the process replies with the memory that it needs and waits for permission. It returns pixels in shared memory.
"""

from __future__ import annotations

import atexit
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom import DicomImage
from babydoctor.imaging.isolation.pool import DecodePool
from babydoctor.imaging.limits import DecodeLimits
from babydoctor.imaging.load import log_warnings, read_source
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.imaging.series import SliceFacts

__all__ = ["DecodePool", "load_image", "load_pixels", "raw_frame", "read_facts", "render", "shared_pool"]


def load_image(
    source: str | Path | bytes, *, name: str = "", limits: DecodeLimits | None = None, pool: DecodePool | None = None
) -> Image.Image:
    """``load.load_image`` in a decoding process of ``pool`` (default: this process's shared pool).

    Raises:
        ImageError: as ``load.load_image``, and ``image_decode_failed`` or ``image_decode_timeout``.
    """
    name, data = read_source(source, name)
    values, info = (pool or shared_pool()).decode(data, name, {}, limits or DecodeLimits())
    image = _to_image(values, info)
    log_warnings(image, name)
    return image


def load_pixels(
    source: str | Path | bytes, settings: ImageSettings, *, name: str = "", limits: DecodeLimits | None = None
) -> np.ndarray:
    """An image as pixels for the vision tower, float32 ``[3, S, S]``: ``load_image`` and ``to_pixels`` in one."""
    name, data = read_source(source, name)
    request = {"pixels": asdict(settings)}
    values, _ = shared_pool().decode(data, name, request, limits or DecodeLimits())
    return values


def render(
    dicom: DicomImage,
    frame: int = 0,
    center: float | None = None,
    width: float | None = None,
    preset: str | None = None,
    *,
    limits: DecodeLimits | None = None,
) -> Image.Image:
    """``dicom.render`` in a decoding process."""
    request = {"render": {"frame": frame, "center": center, "width": width, "preset": preset}}
    return _to_image(*shared_pool().decode(dicom.data, dicom.name, request, limits or DecodeLimits()))


def raw_frame(dicom: DicomImage, frame: int, *, limits: DecodeLimits | None = None) -> bytes:
    """``raw_frame.raw_frame`` in a decoding process."""
    values, _ = shared_pool().decode(dicom.data, dicom.name, {"frame": frame}, limits or DecodeLimits())
    return values.tobytes()


def read_facts(data: bytes, *, name: str, limits: DecodeLimits | None = None) -> SliceFacts:
    """``series.read_facts`` in a decoding process."""
    values, _ = shared_pool().decode(data, name, {"facts": True}, limits or DecodeLimits())
    return SliceFacts.from_json(json.loads(values.tobytes()))


def _to_image(values: np.ndarray, info: dict[str, Any]) -> Image.Image:
    image = Image.fromarray(values)
    image.info.update({key: tuple(value) if isinstance(value, list) else value for key, value in info.items()})
    return image


def shared_pool() -> DecodePool:
    """This process's pool. A forked process gets its own."""
    return _pool_of(os.getpid())


@lru_cache(maxsize=1)
def _pool_of(pid: int) -> DecodePool:
    pool = DecodePool()
    atexit.register(pool.close)
    return pool
