"""What the memory of this device does right now: the yardstick beside every measured decode step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nasbench.engine.clock import stopwatch

BUFFER_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""Many times the largest last-level cache, so that every pass comes from the main memory."""
REPEATS = 9


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs: a ceiling is what the device can do, not what it does on average."""
    work()
    seconds = stopwatch(device)
    return min(seconds(work) for _ in range(REPEATS))


def memory_bandwidth(device: torch.device | str, free_bytes: int) -> tuple[float, float]:
    """(read, copy) bandwidth in 10^9 bytes per second; a copy counts its reads and its writes.

    Args:
        free_bytes: the buffers take at most a quarter of this.
    """
    device = torch.device(device)
    elements = min(BUFFER_BYTES[device.type], free_bytes // 8) // 4
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / _best_s(lambda: source.sum(), device) / 1e9
    # A product is a kernel; copy_ between GPU buffers is handed to a copy engine, which is slower.
    copy = 2 * source.nbytes / _best_s(lambda: torch.mul(source, 2.0, out=target), device) / 1e9
    return read, copy
