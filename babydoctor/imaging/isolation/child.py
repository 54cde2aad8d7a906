"""The decoding process itself: ``python -m babydoctor.imaging.isolation.child SOCKET SHARED_MEMORY``."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from babydoctor.imaging.dicom import DicomImage, render
from babydoctor.imaging.dicom.raw_frame import raw_frame
from babydoctor.imaging.isolation.process import FREE_BYTES
from babydoctor.imaging.limits import DecodeLimits, ImageError
from babydoctor.imaging.load import decode, read_header
from babydoctor.imaging.preprocess import ImageSettings, to_pixels
from babydoctor.imaging.series import read_facts


def serve(connection: socket.socket, shared: int) -> None:
    """Run the decoding process: answer requests until the parent closes the socket."""
    import pydicom.pixels  # noqa: F401  (takes a third of a second, so import it before the first request)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base = _address_space()
    stream = connection.makefile("rwb")

    def answer(message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()
        stream.write(struct.pack("!I", len(text)) + text)
        stream.flush()

    def receive() -> tuple[dict[str, Any], bytes] | None:
        head = stream.read(12)
        if len(head) < 12:
            return None
        length, size = struct.unpack("!IQ", head)
        return json.loads(stream.read(length)), stream.read(size)

    answer({"resident": _resident()})
    while (received := receive()) is not None:
        try:
            answer(_answer(*received, base, shared, answer, receive))
        except MemoryError:
            text = f"{received[0]['name']}: decoding needs more memory than allowed"
            answer({"error": text, "code": "image_decode_failed"})
        except ImageError as error:
            answer({"error": str(error), "code": error.code})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _answer(request: dict[str, Any], data: bytes, base: int, shared: int, answer: Any, receive: Any) -> dict[str, Any]:
    name, limits = request["name"], DecodeLimits(**request["limits"])
    _limit(base + limits.memory_bytes + len(data), limits.seconds)
    if "facts" in request:
        content = json.dumps(read_facts(data, name, limits.max_pixels).to_json()).encode()
        return _share(content, (len(content),), "uint8", {}, shared)
    header = read_header(data, name, limits.max_pixels)
    signal.setitimer(signal.ITIMER_PROF, 0)
    if header.num_pixels * header.bytes_per_pixel > FREE_BYTES:
        answer({"need": [header.num_pixels, header.bytes_per_pixel]})
        if receive() is None:
            sys.exit()
    memory = limits.memory_for(header.num_pixels, header.bytes_per_pixel)
    _limit(base + memory + 2 * len(data), limits.seconds_for(header.num_pixels))
    if "frame" in request and isinstance(header.content, DicomImage):
        content = raw_frame(header.content, request["frame"])
        return _share(content, (len(content),), "uint8", {}, shared)
    if "render" in request and isinstance(header.content, DicomImage):
        image = render(header.content, **request["render"], max_pixels=limits.max_pixels)
    else:
        image = decode(header, limits.max_pixels)
    info: dict[str, Any] = {key: image.info[key] for key in ("window", "warnings") if key in image.info}
    if "pixels" in request:
        values = to_pixels(image, ImageSettings(**request["pixels"]))
        return _share(values.tobytes(), values.shape, "float32", info, shared)
    return _share(image.tobytes(), (image.height, image.width, 3), "uint8", info, shared)


def _share(content: bytes, shape: tuple[int, ...], kind: str, info: dict[str, Any], shared: int) -> dict[str, Any]:
    """Write an array's bytes to the shared memory and return the answer that describes the array."""
    view, done = memoryview(content), 0
    while done < len(view):
        done += os.pwrite(shared, view[done:], done)
    return {"shape": shape, "dtype": kind, "info": info, "resident": _resident()}


def _limit(address_space: int, seconds: float) -> None:
    """Set limits for this process. The system ends it with SIGPROF when its CPU time is used up."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
