"""The least time of a decode step on this device: what each part must move or compute, at rates measured in this run.

    floor = sum over parts of max(bytes / bandwidth, FLOPs / matrix-product rate)

Parts: the matrix products (every weight read once for the whole batch, output matrix included), the keys and values
that attention and windows read, the recurrent states that are read and written in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nasbench.model.shapes import ModelSpec
from nasbench.runtime.clock import stopwatch
from nasbench.spaces.placement import Placement

BUFFER_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""Many times the largest last-level cache, so that every pass comes from the main memory."""
MATRIX = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the product whose rate is measured."""
REPEATS = 9


@dataclass(frozen=True)
class Ceilings:
    """What a device did just now, 10^9 bytes and 10^12 operations per second.

    Attributes:
        read_gb_s: a pass that only reads.
        copy_gb_s: from one buffer to another, reads and writes counted.
        in_place_gb_s: a buffer read and written back, both counted.
        matmul_tflop_s: a large square matrix product.
    """

    read_gb_s: float
    copy_gb_s: float
    in_place_gb_s: float
    matmul_tflop_s: float


@dataclass(frozen=True)
class Part:
    """One part of a decode step: bytes, floating-point operations, and the least milliseconds for them."""

    name: str
    nbytes: int
    flops: int
    ms: float


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs: a ceiling is what the device can do, not what it does on average."""
    work()
    seconds = stopwatch(device)
    return min(seconds(work) for _ in range(REPEATS))


def measure_ceilings(device: torch.device | str, free_bytes: int, dtype: torch.dtype) -> Ceilings:
    """Measures them, on random data.

    Args:
        free_bytes: the buffers take at most a quarter of this.
        dtype: of the matrix product.
    """
    device = torch.device(device)
    elements = min(BUFFER_BYTES[device.type], free_bytes // 8) // 4
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / _best_s(lambda: source.sum(), device)
    # A product is a kernel; copy_ between GPU buffers is handed to a copy engine, which is slower.
    copy = 2 * source.nbytes / _best_s(lambda: torch.mul(source, 2.0, out=target), device)
    in_place = 2 * source.nbytes / _best_s(lambda: source.mul_(0.5), device)
    size = MATRIX[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul = 2 * size**3 / _best_s(lambda: a @ b, device)
    return Ceilings(read / 1e9, copy / 1e9, in_place / 1e9, matmul / 1e12)


def decode_bytes(shape: ModelSpec, placement: Placement, batch: int, context: int, dtype_bytes: int) -> int:
    """Least bytes that one decode step of the whole model moves: every weight once (of an untied input embedding only
    the rows looked up), the caches as each layer kind reads and writes them."""
    return sum(part.nbytes for part in _parts(shape, placement, batch, context, dtype_bytes, None))


def decode_floor(
    shape: ModelSpec, placement: Placement, batch: int, context: int, dtype_bytes: int, ceilings: Ceilings
) -> list[Part]:
    """The parts of one decode step of `batch` sequences at `context` keys; the floor is the sum of their `ms`."""
    return _parts(shape, placement, batch, context, dtype_bytes, ceilings)


def _parts(
    shape: ModelSpec, placement: Placement, batch: int, context: int, width: int, ceilings: Ceilings | None
) -> list[Part]:
    weights = shape.parameters(placement)
    looked_up = 0 if shape.tie_embeddings else (shape.vocab_size - batch) * shape.hidden_size
    # The rows of an embedding are looked up, not multiplied; a tied one is the output matrix.
    products = weights - (0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size)
    kept = {"keys and values": [0, 0], "recurrent states": [0, 0]}
    for name, count in Counter(placement).items():
        config = shape.mixer(name)
        moved = config.traffic_bytes(batch, context, width)
        part = kept["recurrent states" if moved > config.cache_bytes(batch, context, width) else "keys and values"]
        part[0] += count * moved
        part[1] += count * batch * max(0, config.flops(1, context - 1) - 2 * config.parameters())
    read, in_place = (ceilings.read_gb_s, ceilings.in_place_gb_s) if ceilings else (1.0, 1.0)
    rate = ceilings.matmul_tflop_s if ceilings else 1.0
    sizes = [("matrix products", (weights - looked_up) * width, 2 * batch * products, read)]
    sizes += [
        (name, nbytes, flops, in_place if name == "recurrent states" else read)
        for name, (nbytes, flops) in kept.items()
    ]
    # Only products run at the rate of the matrix units; what follows a cache is bound by its bytes.
    return [
        Part(name, nbytes, flops, max(nbytes / speed / 1e6, flops / rate / 1e9 if name == "matrix products" else 0.0))
        for name, nbytes, flops, speed in sizes
        if nbytes
    ]
