"""The compiled operator: ``step.cpp`` built at first use for this machine's processor, kept in the user's cache.

It is loaded with ctypes and takes pointers, so it needs no headers of PyTorch and builds in seconds. It is linked
without an OpenMP library and uses the one that PyTorch has loaded, so both share their threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fopenmp", "-fPIC")
BUILD_TIMEOUT_S = 120

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Product(ctypes.Structure):
    """``Product`` of ``step.cpp``."""

    _fields_ = (("weights", _POINTER), ("scales", _POINTER), ("sums", _POINTER), ("outputs", _INT), ("inputs", _INT))


class Layer(ctypes.Structure):
    """``Layer`` of ``step.cpp``."""

    _fields_ = (
        ("input_norm", _POINTER),
        ("post_norm", _POINTER),
        ("query_key_value", Product),
        ("output", Product),
        ("gate_up", Product),
        ("down", Product),
        ("keys", _POINTER),
        ("values", _POINTER),
    )


class Model(ctypes.Structure):
    """``Model`` of ``step.cpp``."""

    _fields_ = (
        *((name, _INT) for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")),
        ("capacity", _INT),
        ("threads", _INT),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("embeddings", _POINTER),
        ("final_norm", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("head", Product),
        ("layers", ctypes.POINTER(Layer)),
    )


@functools.cache
def load_operator() -> ctypes.CDLL | None:
    """The operator, built if it is not in the cache yet. None, and a log message with the reason, if that fails."""
    try:
        operator = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        logger.info("the engine's CPU operator could not be built, PyTorch's operations are used: %s", detail[-1:])
        return None
    operator.step.argtypes = (ctypes.POINTER(Model), _INT, *[_POINTER] * 4)
    operator.multiply.argtypes = (ctypes.POINTER(Product), _INT, _INT, _POINTER, _POINTER)
    operator.step.restype = operator.multiply.restype = None
    return operator


def _build() -> Path:
    """Path of the built library. Its name holds what it depends on: source, flags, compiler and processor."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler; install g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), " ".join(FLAGS), version, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "babydoctor"
    library = folder / f"step-{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch) / "step.o", Path(scratch) / "step.so"
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S)
        linked.replace(library)  # atomic, so that processes that start together do not disturb each other
    return library


def _processor() -> str:
    """What ``-march=native`` depends on. A home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
