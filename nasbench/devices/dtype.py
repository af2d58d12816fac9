"""Which data type a device is faster in."""

from __future__ import annotations

import timeit
from collections.abc import Callable

ROWS, WIDTH, INNER = 512, 576, 1536
"""A product of the default model's MLP over the tokens of a training batch."""
ROUNDS = 5


def faster_dtype(device: str) -> str:
    """bf16 on a GPU; on a CPU what multiplies matrices in less time: without instructions for it, bf16 is converted to
    fp32 and back, several times slower than fp32 itself."""
    import torch

    if not device.startswith("cpu"):
        return "bf16"
    seconds = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(size, WIDTH, generator=generator).to(kind) for size in (ROWS, INNER))

        def product(x: torch.Tensor = x, weight: torch.Tensor = weight) -> object:
            return torch.nn.functional.linear(x, weight)

        seconds[name] = _least_seconds(product)
    return min(seconds, key=lambda name: (seconds[name], name))


def _least_seconds(call: Callable[[], object]) -> float:
    call()
    return min(timeit.repeat(call, number=1, repeat=ROUNDS))
