"""How much memory a device has and a decoder needs. Imports torch only to ask a device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.by_device import ByDevice
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

if TYPE_CHECKING:
    import torch

USABLE = ByDevice(cpu=0.6, cuda=0.985)
"""Share of the free memory that a model may take: allocators fragment (on an H200, 8 % more sequences ran than fit in
0.92 of it: reports/cost-h200/largest-batch.csv), and a CPU has other programs to feed."""

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str) -> int:
    """Bytes that a new allocation can get now; on a CPU the container's limit counts too."""
    import torch

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


def peak_bytes(device: torch.device) -> int:
    """Most memory held at once: of the GPU's allocator since its last reset, or of the whole process on a CPU."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed. torch's own allocator has a class for it; what CUDA allocates beside it (streams,
    graphs, kernels) and a CPU's allocator say it in words."""
    import torch

    told = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in told for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def weight_bytes(shape: ModelSpec, placement: Placement, dtype_bytes: int) -> int:
    """Bytes of all weights of a model."""
    return shape.parameters(placement) * dtype_bytes


def activation_bytes(shape: ModelSpec, dtype_bytes: int) -> int:
    """Bytes of a sequence's logits, in two data types, and of its widest activations while a token is decoded."""
    # A gated FFN of inner width I has three matrices of hidden size x I.
    widest = max((ffn.product_parameters() for ffn in set(shape.ffns())), default=0) // (3 * shape.hidden_size)
    return shape.vocab_size * (4 + dtype_bytes) + 4 * (widest + shape.hidden_size) * 4


def sequence_bytes(shape: ModelSpec, placement: Placement, context: int, dtype_bytes: int) -> int:
    """Bytes that each sequence of a decode batch adds: its caches and activations."""
    cache = shape.cache_bytes(placement, 1, context, dtype_bytes) + shape.conv_state_bytes(placement, 1, dtype_bytes)
    return cache + activation_bytes(shape, dtype_bytes)


def sequences_that_fit(
    shape: ModelSpec, placement: Placement, context: int, dtype_bytes: int, room_bytes: float, *, loaded: bool = False
) -> int:
    """Sequences of `context` tokens that fit in `room_bytes` beside the weights; 0 if not even one does.

    Args:
        loaded: the weights are in memory already and take none of the room.
    """
    room = room_bytes - (0 if loaded else weight_bytes(shape, placement, dtype_bytes))
    return max(0, int(room // sequence_bytes(shape, placement, context, dtype_bytes)))


def largest_batch(
    shape: ModelSpec, placement: Placement, context: int, dtype_bytes: int, device: torch.device | str, *, loaded: bool
) -> int:
    """Sequences that fit in what is free on a device now."""
    room = free_bytes(device) * USABLE.of(device)
    return sequences_that_fit(shape, placement, context, dtype_bytes, room, loaded=loaded)


def lean_hybrid(shape: ModelSpec, name: str, names: Sequence[str], context: int, dtype_bytes: int) -> Placement:
    """One layer of a kind, and all others of the kind among `names` whose cache is the smallest."""
    leanest = min(names, key=lambda other: sequence_bytes(shape, (other,) * shape.num_layers, context, dtype_bytes))
    return (name, *(leanest,) * (shape.num_layers - 1))
