"""The compiled operator: ``step.cpp`` and ``product.h``, built at first use for this processor, then cached.

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
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("step.cpp")
HEADER = SOURCE.with_name("product.h")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fopenmp", "-fPIC")
BUILD_TIMEOUT_S = 120

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class StepProduct(ctypes.Structure):
    """``Product`` of ``product.h``. ``down`` and ``up`` point to those of a LoRA."""

    _fields_ = (
        *((name, _POINTER) for name in ("weights", "scales", "sums")),
        ("outputs", _INT),
        ("inputs", _INT),
        ("down", _POINTER),
        ("up", _POINTER),
    )


class StepLayer(ctypes.Structure):
    """``Layer`` of ``step.cpp``."""

    _fields_ = (
        ("input_norm", _POINTER),
        ("post_norm", _POINTER),
        ("query_key_value", StepProduct),
        ("output", StepProduct),
        ("gate_up", StepProduct),
        ("down", StepProduct),
        ("keys", _POINTER),
        ("values", _POINTER),
    )


class StepModel(ctypes.Structure):
    """``Model`` of ``step.cpp``."""

    _fields_ = (
        *((name, _INT) for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")),
        ("capacity", _INT),
        ("threads", _INT),
        ("rank", _INT),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("embeddings", _POINTER),
        ("final_norm", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("head", StepProduct),
        ("layers", ctypes.POINTER(StepLayer)),
    )


class Operator:
    """The functions of ``step.cpp``. The caller keeps the tensors alive that pointers point to."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._step, self._multiply = functions.step, functions.multiply
        self._step.argtypes = (ctypes.POINTER(StepModel), _INT, *[_POINTER] * 4)
        self._multiply.argtypes = (ctypes.POINTER(StepProduct), _INT, _INT, _POINTER, _POINTER)
        self._step.restype = self._multiply.restype = None

    def step(self, model: StepModel, num_rows: int, pointers: Sequence[int]) -> None:
        """One decoding step. ``pointers``: int64 tokens, slots and positions ``[R]``, float32 logits ``[R, vocab]``."""
        self._step(model, num_rows, *pointers)

    def multiply(self, product: StepProduct, num_threads: int, num_rows: int, rows: int, outputs: int) -> None:
        """One product of bfloat16 ``[M, in]`` at ``rows`` to bfloat16 ``[M, out]`` at ``outputs``."""
        self._multiply(product, num_threads, num_rows, rows, outputs)


def address(product: StepProduct) -> int:
    """The pointer to a product that belongs to a LoRA. The caller keeps the product alive."""
    return ctypes.addressof(product)


def layer_array(layers: Sequence[StepLayer]) -> ctypes.Array[StepLayer]:
    """The layers as the C array that ``StepModel`` points to."""
    return (StepLayer * len(layers))(*layers)


@functools.cache
def load_operator() -> Operator | None:
    """The operator, built if it is not in the cache yet. None, and a log message with the reason, if that fails."""
    try:
        return Operator(build_library())
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        logger.info("the engine's CPU operator could not be built, PyTorch's operations are used: %s", detail[-1:])
        return None


def build_library(target: str = "native") -> Path:
    """Path of the built library. Its name contains a digest of source, flags, compiler and processor.

    Args:
        target: the processor to compile for, as in ``-march``.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler; install g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, HEADER)]
    flags = (f"-march={target}", *FLAGS)
    parts = (*sources, " ".join(flags), version, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "babydoctor"
    library = folder / f"step-{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch) / "step.o", Path(scratch) / "step.so"
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)],
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
