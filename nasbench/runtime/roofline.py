"""The least time of a decode step on this device: bytes and operations of each part at rates measured in this run.

    floor = sum over parts of max(bytes / bandwidth, FLOPs / matrix-product rate)

Parts: the matrix products (every weight read once for the whole batch, output matrix included), the keys and values
that attention and windows read, the recurrent states that are read and written in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from nasbench.core.by_device import ByDevice
from nasbench.model.shapes import ModelSpec
from nasbench.runtime.timing import stopwatch
from nasbench.spaces.placement import Placement

Call = Callable[[], object]

BUFFER_BYTES = ByDevice(cpu=256 << 20, cuda=4 << 30)
"""Many times the largest last-level cache, so that every pass comes from the main memory."""
MATRIX = ByDevice(cpu=1024, cuda=8192)
"""Rows and columns of the product whose rate is measured."""
REPEATS = 9


@dataclass(frozen=True)
class Ceilings:
    """Rates that a device reached just now, 10^9 bytes and 10^12 operations per second.

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


def _best_s(work: Call, device: torch.device) -> float:
    """Seconds of the fastest of a few runs: a ceiling is what the device can do, not what it does on average."""
    work()
    seconds = stopwatch(device)
    return min(seconds(work) for _ in range(REPEATS))


def ceiling_work(
    device: torch.device | str, free_bytes: int, dtype: torch.dtype
) -> Iterator[tuple[str, Call, int, int]]:
    """Yields (name, work, bytes, operations) of each ceiling, on random data.

    Args:
        free_bytes: the buffers take at most a quarter of this.
        dtype: of the matrix product.
    """
    device = torch.device(device)
    source = torch.rand(min(BUFFER_BYTES.of(device), free_bytes // 8) // 4, device=device)
    target, total = torch.empty_like(source), torch.empty((), device=device)
    yield "read", partial(torch.sum, source, out=total, dim=None, dtype=torch.float32), source.nbytes, 0
    # A multiplication is a kernel; copy_ between GPU buffers is handed to a copy engine, which is slower.
    yield "copy", partial(torch.mul, source, 1.0, out=target), 2 * source.nbytes, 0
    yield "in_place", partial(source.mul_, 1.0), 2 * source.nbytes, 0
    del source, target
    size = MATRIX.of(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    yield "matmul", partial(torch.mm, a, b, out=torch.empty_like(a)), 0, 2 * size**3


@torch.inference_mode()
def measure_ceilings(device: torch.device | str, free_bytes: int, dtype: torch.dtype) -> Ceilings:
    """Measures the rates of `ceiling_work`."""
    device = torch.device(device)
    rates = {}
    for name, work, nbytes, flops in ceiling_work(device, free_bytes, dtype):
        rates[name] = (nbytes / 1e9 or flops / 1e12) / _best_s(work, device)
    return Ceilings(rates["read"], rates["copy"], rates["in_place"], rates["matmul"])


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
    blocks = shape.blocks(placement)
    norms = shape.norms * shape.hidden_size
    head = shape.vocab_size * shape.hidden_size
    # The rows of an embedding are looked up, not multiplied; a tied one is the output matrix.
    looked_up = 0 if shape.tie_embeddings else batch * shape.hidden_size
    weight_bytes = sum(block.weight_bytes(batch, width) for block in blocks) + (norms + head + looked_up) * width
    products = sum(block.product_parameters() for block in blocks) + norms + head
    kept = {"keys and values": [0, 0], "recurrent states": [0, 0]}
    for block, count in Counter(blocks).items():
        part = kept["recurrent states" if block.recurrent else "keys and values"]
        part[0] += count * block.traffic_bytes(batch, context, width)
        part[1] += count * batch * max(0, block.flops(1, context - 1) - 2 * block.product_parameters())
    read, in_place = (ceilings.read_gb_s, ceilings.in_place_gb_s) if ceilings else (1.0, 1.0)
    rate = ceilings.matmul_tflop_s if ceilings else 1.0
    sizes = [("matrix products", weight_bytes, 2 * batch * products, read)]
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
