"""Measuring: live bytes at the peak, and the ceilings that speeds are held against: matrix products and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def peak_allocated_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that tensors took at once while ``function`` ran, beyond what was there before.

    Every allocation counts, those inside operations too. On the CPU it is the allocator's own record, taken by
    torch's profiler, and not the size of the process, which also holds what the C library keeps for later.
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
        while state is not None:  # double quantisation: the scales have a state of their own
            for value in (state.absmax, state.code, state.offset):
                add(value)
            state = state.state2
    return sum(storages.values())


def matmul_flops_per_s(device: str = "cpu", size: int = 2048, rounds: int = 5) -> float:
    """The best rate of a bfloat16 product of square matrices: the ceiling for everything else."""
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right, device, rounds)


def memory_bytes_per_s(device: str = "cpu", size_bytes: int = 512 * 2**20, rounds: int = 5) -> float:
    """The best rate of reading (a sum) or copying (both ways counted) a tensor far larger than the caches."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    reading = size_bytes / _best_seconds(source.sum, device, rounds)
    copying = 2 * size_bytes / _best_seconds(lambda: target.copy_(source), device, rounds)
    return max(reading, copying)


def _best_seconds(function: Callable[[], Any], device: str, rounds: int) -> float:
    """The shortest of ``rounds`` calls and one more, which warms up."""
    best = float("inf")
    for _ in range(rounds + 1):
        synchronize(device)
        begun = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
