"""`DeviceSpec` is a device's data sheet, `DeviceInfo` a device that this machine has.

A family of devices is one file with a tuple `SPECS`. Third parties register a DeviceSpec under the entry-point group
`nasbench.devices`, its slug as the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nasbench.core.registry import Registry

FIGURES = ("memory_bytes", "bandwidth_gb_s", "tflop_s", "shared_memory_bytes")
"""Figures of a DeviceSpec."""
CAPABILITIES = "CUDA C++ programming guide, technical specifications by compute capability"
"""Where the shared memory of every NVIDIA GPU is from."""


@dataclass(frozen=True)
class DeviceSpec:
    """A data sheet. Figures are the vendor's, dense, without sparsity; what a device reaches is measured.

    Attributes:
        slug: name in commands and file names, e.g. "nvidia-h200".
        pattern: regular expression that the name given by the driver matches.
        arch: compute capability, e.g. "sm_90".
        bandwidth_gb_s: of the main memory, 10^9 bytes per second.
        tflop_s: bf16/fp16 matrix products with fp32 accumulation.
        shared_memory_bytes: most that one thread block may use.
        source: where the figures are from.
        sources: (figure, where it is from) for those that neither `source` nor CAPABILITIES covers.
        unified_memory: whether the CPU lives in the same memory.
    """

    slug: str
    title: str
    pattern: str
    arch: str
    memory_bytes: int
    bandwidth_gb_s: float
    tflop_s: float
    shared_memory_bytes: int
    source: str
    sources: tuple[tuple[str, str], ...] = ()
    unified_memory: bool = False

    @property
    def figure_sources(self) -> dict[str, str]:
        """Where each figure is from."""
        found = dict(self.sources)
        if self.arch.startswith("sm_"):
            found.setdefault("shared_memory_bytes", f"{CAPABILITIES}, {self.arch[3:-1]}.{self.arch[-1]}")
        return {name: found.get(name, self.source) for name in FIGURES}

    def matches(self, name: str) -> bool:
        """Whether a driver's device name is this device."""
        return re.search(self.pattern, name, re.IGNORECASE) is not None


@dataclass(frozen=True)
class DeviceInfo:
    """A device that is there.

    Attributes:
        slug: name of its profile database.
        title: as the machine calls it.
        kind: "cpu" or "cuda".
        memory_bytes: main memory; on a CPU what is left to this process by its control group.
        cores: multiprocessors of a GPU, CPUs that this process may run on.
        llc_bytes: last-level cache; 0 if unknown.
        driver: GPU driver's version; "" on a CPU.
        arch: compute capability or instruction set.
        unified_memory: whether a GPU's memory is the system's (Jetson).
    """

    slug: str
    title: str
    kind: str
    memory_bytes: int
    cores: int
    llc_bytes: int
    driver: str
    arch: str
    unified_memory: bool = False


DEVICES: Registry[DeviceSpec] = Registry("device", group="nasbench.devices")


def slugify(name: str) -> str:
    """`Intel(R) Xeon(R) CPU @ 2.20GHz` -> `intel-xeon`: lower case, without trade marks, clock and filler words."""
    text = re.sub(r"\((r|tm|c)\)|®|™|@.*$", " ", name, flags=re.IGNORECASE)
    text = re.sub(r"\b(cpu|processor|\d+-core|geforce)\b", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
