"""Devices by name: memory, peak speed and bandwidth."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from babydoctor.cores import num_cores
from babydoctor.schema import UserError

ASSUMED_UTILIZATION = 0.5
"""Share of ``flops_per_s`` that a training step is planned with; recomputation counts as work.

An assumption, not a measurement: PaLM reports 57.8% counted this way (Chowdhery et al. 2022, section 4.1). Replace it
with what ``babydoctor bench train --preset 7b`` measures on a GPU.
"""


@dataclass(frozen=True)
class Hardware:
    """A device.

    Attributes:
        memory_bytes: memory that one program can use.
        flops_per_s: dense bfloat16 matrix peak with float32 accumulation.
        bytes_per_s: memory bandwidth.
    """

    name: str
    memory_bytes: int
    flops_per_s: float
    bytes_per_s: float
    is_cuda: bool = True


# Peaks without sparsity, from NVIDIA's data sheets (A10, A100 40/80 GB SXM, L4, L40S, RTX A6000, H100 SXM, H200 SXM)
# and the Ada white paper (4090). Memory is the total that nvidia-smi reports; with ECC on, it is below nominal.
GPUS = {
    name: Hardware(name, round(mib * 2**20), tflops * 1e12, gb_per_s * 1e9)
    for name, mib, tflops, gb_per_s in (
        ("a10", 23028, 125, 600),
        ("a100-40", 40960, 312, 1555),
        ("a100-80", 81920, 312, 2039),
        ("l4", 23034, 121, 300),
        ("4090", 24564, 165, 1008),
        ("a6000", 49140, 155, 768),
        ("l40s", 46068, 362, 864),
        ("h100", 81559, 989, 3350),
        ("h200", 143771, 989, 4800),
    )
}
GPUS["a100"] = GPUS["a100-80"]

CPU_FLOPS_PER_S_PER_CORE = 2e11
CPU_BYTES_PER_S = 2e10
"""Rough values for a server core with AVX512-BF16; ``babydoctor bench train`` measures the real ones."""


def find_hardware(name: str) -> Hardware:
    """A GPU of the table, or this machine's CPU for ``cpu``.

    Raises:
        UserError: the name is not known.
    """
    key = name.lower()
    if key == "cpu":
        return this_cpu()
    if key not in GPUS:
        raise UserError(f"--gpu {name!r} is not one of {', '.join((*GPUS, 'cpu'))}")
    return GPUS[key]


def this_cpu() -> Hardware:
    """This machine's CPU with all of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", memory, num_cores() * CPU_FLOPS_PER_S_PER_CORE, CPU_BYTES_PER_S, is_cuda=False)


def this_device(device: str) -> Hardware:
    """The device of a run: the CPU, or the CUDA device, with the table's peaks if its name is known."""
    if not device.startswith("cuda"):
        return this_cpu()
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    words = properties.name.lower().replace("-", " ").split()
    near = [gpu for name, gpu in GPUS.items() if name.split("-")[0] in words]
    # Among variants, take the one with the nearest memory. An unknown device gets the A10's peaks and its own memory.
    known = min(near or [GPUS["a10"]], key=lambda gpu: abs(gpu.memory_bytes - properties.total_memory))
    return replace(known, name=properties.name, memory_bytes=properties.total_memory)


def choose_device(name: str) -> str:
    """Resolve ``auto`` to CUDA if there is a GPU, else to the CPU.

    Raises:
        UserError: the name is not known, or there is no such device.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not has_cuda:
        raise UserError("--device cuda: this torch sees no CUDA GPU; `babydoctor doctor` says why")
    return name
