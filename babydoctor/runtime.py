"""All process-wide switches: environment, C library, OpenMP, floating-point mode, thread count, library messages.

Only the command line calls this module, so using the package as a library does not change the process. Commands call
one ``prepare_*`` function before they import torch. Two switches must wait until memory is in use. The training loop
and the engine take them as hooks (``settle_training_memory``, ``prepare_engine``).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from babydoctor.memory_maps import clean_weight_files, dense_spans

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MAX_MMAP_THRESHOLD = 32 * 2**20
"""The largest value that glibc accepts on 64-bit machines."""

ENGINE_KEPT_BYTES = 512 * 2**20
TRAINING_KEPT_BYTES = 2**31 - 1
"""The largest value of ``mallopt``, which takes an int. Training frees all activations at the end of a step."""

MAX_HUGE_BYTES = 8 * 2**30
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25

SPIN_COUNT = "1000"
"""``GOMP_SPINCOUNT``: after this many rounds of a loop (microseconds), a thread that waits for others sleeps."""

_OMP_PAUSE_SOFT = 1
"""``omp_pause_soft`` of OpenMP 5.0: settings stay, threads end."""

_PR_SET_PDEATHSIG = 1
_PARENT_POLL_S = 0.5


# One function per kind of command.


def prepare_process() -> None:
    """Switches for every command. Call it first, before torch is loaded and before a process is started."""
    share_cores()
    quiet_libraries()


def quiet_libraries() -> None:
    """Silence messages of libraries that a user cannot act on. Imports nothing heavy.

    - bitsandbytes advises on the CPU to install a package that downloads kernels. 4-bit layers work without it.
    - DeepSpeed, if it is installed, says on import that there is no GPU.
    - transformers warns about its own loading, generation and processors. This package reads configurations and weights
      itself and reports what is wrong with them as errors. ``TRANSFORMERS_VERBOSITY`` brings the warnings back.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # DeepSpeed sets the level of its logger itself when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def hide_saving_progress() -> None:
    """Hide transformers' bar for each model that it saves. For commands that save small models."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def prepare_training() -> None:
    """Switches for commands that train: ``train``, ``demo``, ``tiny-base``, ``eval stages``. Call before CUDA starts.

    All of them flush denormals, so a stage gives the same weights whichever command trains it.
    """
    use_expandable_segments()
    flush_denormals()
    if not _has_cuda():
        keep_freed_memory(TRAINING_KEPT_BYTES)


def prepare_inference() -> None:
    """Switches for ``chat`` and ``eval``: the floating-point mode of training. Call before CUDA starts."""
    flush_denormals()
    use_own_gpu()


def prepare_bench() -> None:
    """Switches for ``bench``: those of training without the floating-point mode. Call before CUDA starts."""
    use_expandable_segments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler prints when it starts and stops
    if not _has_cuda():
        keep_freed_memory(TRAINING_KEPT_BYTES)


def settle_training_memory() -> None:
    """Hook for the training loop on the CPU, called once weights, optimizer state and activations are allocated."""
    use_huge_pages()


def prepare_engine(device: str, num_threads: int | None) -> None:
    """Hook for the engine, called on the thread that built it, just before the engine's own thread starts.

    Args:
        device: ``cpu`` or ``cuda``.
        num_threads: CPU threads per operator; None: torch's default.
    """
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)  # threads that start later take this count
    if device == "cpu":
        return_freed_memory()
        keep_freed_memory(ENGINE_KEPT_BYTES)
        use_huge_pages()
        release_team()  # the calling thread has loaded and packed the weights and does not compute anymore


@contextmanager
def prepare_web_ui() -> Iterator[None]:
    """Settings that Gradio reads from the environment: no telemetry, no downloads, a private folder for its files.

    The web UI writes no files. If Gradio does, other users of the machine must not be able to read them.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="babydoctor-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def die_with_parent(parent: str | None) -> None:
    """End this process when the process that launched it ends, even if that one is killed.

    Args:
        parent: process id of the launcher; None: this process has no launcher.
    """
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(int(parent),), daemon=True).start()
    if os.getppid() != int(parent):  # the launcher ended before this call
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


# The switches.


def share_cores() -> None:
    """Let OpenMP's threads sleep after a short wait, unless the user has said how they wait.

    By default GNU's OpenMP spins for some milliseconds at each barrier. Beside another busy process the thread that it
    waits for may not be running, so both lose their time. Measured in stage 1 of the tiny preset on two cores: beside
    other work 9 samples/s with a count of 100,000, 66 with 1,000, 71 without spinning and 58 with one thread; on an
    idle machine 212 by default, 205 with 1,000 and 180 without spinning.

    OpenMP reads the variables when it is loaded with torch, and child processes inherit them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def use_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments, unless the user has configured it.

    Measured on a GPU without this: 19.9 GiB of tensors reserved 25.1 GiB.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # torch's newer name for the same variable
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def use_own_gpu() -> None:
    """Hide the other GPUs from a rank of a launch, so that ``cuda`` is its own one on every thread."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(rank)] if visible is None else visible.split(",")[rank : rank + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = "".join(devices)


def flush_denormals() -> None:
    """Treat denormal numbers as zero, in this thread and in threads that it starts later.

    They occur while losses are flat, and arithmetic with them is a hundred times slower on a CPU.
    """
    import torch

    torch.set_flush_denormal(True)


def keep_freed_memory(kept_bytes: int) -> None:
    """Tell glibc to keep up to ``kept_bytes`` of freed memory. Does nothing with another C library.

    A step allocates temporary tensors of a few MB. By default glibc returns such blocks to the system when they are
    freed, and the next step takes a page fault for every page. Measured: attention over 256 positions took 3.6 ms per
    layer instead of 1.3 ms.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, kept_bytes)


def return_freed_memory() -> None:
    """Return what loading has left behind to the system: freed memory, and the pages of weight files.

    The engine multiplies with a packed copy of the weights. The files stay mapped, because the rows of the embedding
    are read from them, but most of their pages are never read again. A page that is read comes back from the file.
    Measured with a worker for the mini model, whose weights take 110 MiB: 620 instead of 711 MiB.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    trim, madvise = getattr(library, "malloc_trim", None), getattr(library, "madvise", None)
    if trim is not None:
        trim(0)
    if madvise is None:
        return
    for start, end in clean_weight_files():
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def use_huge_pages(max_bytes: int = MAX_HUGE_BYTES) -> int:
    """Move the memory of this process into huge pages, as far as they are available. Linux only.

    Each step reads all weights in order. With 4 KiB pages, every page needs an address translation and stops the
    processor's prefetching. Measured: a decoding step takes 6.2 ms with 4 KiB pages and 5.7 ms with 2 MiB pages.

    Only private anonymous memory that is in use is moved, so memory use hardly grows: huge pages would also fill the
    holes that loading has left. The engine's KV cache is shared memory and sparsely used, so it is not moved.

    Args:
        max_bytes: stop after moving this much. Moving takes about 2 s per GB.

    Returns:
        Bytes moved.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is None:
        return 0
    moved = 0
    for start, end in dense_spans():
        end = min(end, start + max_bytes - moved)
        span = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        # The second call fails before Linux 6.1, with no harm.
        if madvise(*span, _MADV_HUGEPAGE) == 0 and madvise(*span, _MADV_COLLAPSE) == 0:
            moved += end - start
        if moved >= max_bytes:
            break
    return moved


def release_team() -> bool:
    """End the calling thread's OpenMP helper threads. Its next parallel operator starts new ones.

    Every thread that has run a parallel torch operator keeps a team of helper threads. If all teams together have more
    threads than there are cores, GNU OpenMP sleeps between operators instead of spinning, hundreds of times per
    decoding step. Measured on two cores after another thread had loaded the model: 8.7 ms per step instead of 5.9 ms.

    Returns:
        True if the helpers were ended. False if torch uses another OpenMP library than GNU's; others do not have this
        problem.
    """
    import torch

    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        pause = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if pause is not None:
            return bool(pause(_OMP_PAUSE_SOFT) == 0)
    return False


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
