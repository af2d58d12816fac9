"""Constants that differ between kinds of devices."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class ByDevice(Generic[T]):
    """One value for each kind of device. A kind without its own value (MPS, XPU) has the CPU's.

    `CHUNK = ByDevice(cpu=512, cuda=8192)`, then `CHUNK.of("cuda:1")`.
    """

    def __init__(self, cpu: T, **others: T) -> None:
        self._cpu, self._others = cpu, others

    def of(self, device: object) -> T:
        """The value of a torch device, or of its name or kind."""
        kind = str(getattr(device, "type", device)).partition(":")[0]
        return self._others.get(kind, self._cpu)


PREFILL_CHUNK = ByDevice(cpu=512, cuda=8192)
"""Prefill tokens of a sequence at a time. Enough to keep the device busy: with 4096 a slow host launches too slowly for
one sequence of 64K tokens a third of the time. Few enough that activations stay small."""
