"""Measurements: peak memory, and the limits that speeds are compared with (matrix products, memory bandwidth)."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_allocated_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Peak bytes of tensors while ``function`` ran, beyond those that existed before.

    Every allocation counts, also those inside operations. On the CPU the figures are the allocator's own, read with
    torch's profiler. The size of the process would include freed memory that the C library keeps.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, and of the scales of 4-bit weights; shared storage counts once."""
    storages: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    for tensor in (*module.parameters(), *module.buffers()):
        add(tensor)
        state = getattr(tensor, "quant_state", None)
        while state is not None:  # double quantization: the scales have a state of their own
            for value in (state.absmax, state.code, state.offset):
                add(value)
            state = state.state2
    return sum(storages.values())


def matmul_flops_per_s(device: str = "cpu", size: int = 2048, rounds: int = 5) -> float:
    """The best rate of a bfloat16 product of square matrices, the upper limit for all other code."""
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right, device, rounds)


def memory_bytes_per_s(device: str = "cpu", size_bytes: int = 512 * 2**20, rounds: int = 5) -> float:
    """The best rate of summing or copying a tensor far larger than the caches. A copy counts reads and writes."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    reading = size_bytes / _best_seconds(source.sum, device, rounds)
    copying = 2 * size_bytes / _best_seconds(lambda: target.copy_(source), device, rounds)
    return max(reading, copying)


def _best_seconds(function: Callable[[], Any], device: str, rounds: int) -> float:
    """The shortest of ``rounds`` calls after one call to warm up."""
    best = float("inf")
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_rss_bytes(pid: int) -> int:
    """Peak resident memory of a process (Linux); 0 if the system does not report it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def processor_name() -> str:
    """The processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
