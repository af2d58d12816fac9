"""Timing of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs its argument and returns the seconds it took on the device, launches included."""
    if device.type != "cuda":

        def on_host(work: Callable[[], object]) -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        return on_host

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_device(work: Callable[[], object]) -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_device
