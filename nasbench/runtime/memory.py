"""How much memory a device has left, and what a decoder needs of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

USABLE = {"cuda": 0.985, "cpu": 0.6}
"""Share of the free memory that a measurement may take: allocators fragment (on an H200, 8 % more sequences ran than
fit in 0.92 of it: reports/cost-h200/largest-batch.csv), and a CPU has other programs to feed."""

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str) -> int:
    """Bytes that a new allocation can get now; on a CPU the container's limit counts too."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container limit
        return available
    return min(available, limit - used)


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed. torch's own allocator has a class for it; what CUDA allocates beside it (streams,
    graphs, kernels) and a CPU's allocator say it in words."""
    told = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in told for words in ("out of memory", "can't allocate memory")
    )


def weight_bytes(shape: ModelSpec, placement: Placement, dtype_bytes: int) -> int:
    return shape.parameters(placement) * dtype_bytes


def sequence_bytes(shape: ModelSpec, placement: Placement, context: int, dtype_bytes: int) -> int:
    """Bytes that each sequence of a decode batch adds: its caches, its logits in two dtypes, its widest activations."""
    cache = shape.cache_bytes(placement, 1, context, dtype_bytes) + shape.conv_state_bytes(placement, 1, dtype_bytes)
    return cache + shape.vocab_size * (4 + dtype_bytes) + 4 * (shape.intermediate_size + shape.hidden_size) * 4


def largest_batch(
    shape: ModelSpec, placement: Placement, context: int, dtype_bytes: int, device: torch.device | str, *, loaded: bool
) -> int:
    """Sequences that fit by this model of the memory; 0 if not even one does.

    Args:
        loaded: the weights are on the device already.
    """
    room = int(free_bytes(device) * USABLE[torch.device(device).type])
    if not loaded:
        room -= weight_bytes(shape, placement, dtype_bytes)
    return max(0, room // sequence_bytes(shape, placement, context, dtype_bytes))
