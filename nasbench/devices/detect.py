"""Finds the device of this machine by the operating system, NVML and, for GPUs, torch."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from nasbench.core.errors import MachineError, UserError, unknown
from nasbench.devices.base import DEVICES, DeviceInfo, slugify
from nasbench.devices.jetson import Jetson

LEAST_UNIFIED = 0.8
"""Of a Jetson's memory the system shows at least this share: less belongs to a smaller module of the name."""
_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def detect(torch_device: str = "auto") -> DeviceInfo:
    """The device behind a torch device name.

    Args:
        torch_device: "cpu", "cuda", "cuda:1"; "auto" asks NVML, without importing torch, for a GPU, else the CPU.

    Raises:
        UserError: another name. MachineError: no such GPU.
    """
    kind, _, index = torch_device.partition(":")
    if kind == "cpu":
        return _cpu()
    if kind == "cuda":
        return _cuda(int(index) if index.isdecimal() else 0)
    if kind == "auto":
        return _nvml() or _cpu()
    raise unknown("torch device", torch_device, ("auto", "cpu", "cuda"))


def detect_equal(devices: Sequence[str]) -> DeviceInfo:
    """What several devices are that measure into one database. Raises UserError where they are not equal."""
    info = detect(devices[0])
    for other in devices[1:]:
        if (its := detect(other)) != info:
            raise UserError(f"{other} is {its.title}, {devices[0]} {info.title}: rows of unequal cards do not mix")
        if info.kind == "cuda" and devices.count(other) > 1:
            raise UserError(f"{other} is named twice: a card measures one row at a time")
    return info


def memory_bytes_of(slug: str) -> int | None:
    """Memory of a device, by its data sheet or because it is here; None for any other."""
    if slug in DEVICES:
        return DEVICES[slug].memory_bytes
    here = (detect("auto"), detect("cpu"))
    return next((info.memory_bytes for info in here if info.slug == slug and info.memory_bytes), None)


def _gpu_slug(name: str, memory_bytes: int = 0) -> str:
    """The slug of the known device that the driver's name matches, or one made of the name.

    Args:
        memory_bytes: tells modules of one name apart whose memory is the system's; 0 where it is not known.
    """
    known = next((DEVICES[slug] for slug in DEVICES if DEVICES[slug].matches(name)), None)
    if known and known.unified_memory and memory_bytes and memory_bytes < LEAST_UNIFIED * known.memory_bytes:
        gib = 1 << (memory_bytes * 8 // 7 >> 30).bit_length() - 1
        return slugify(f"{name} {gib}GB" if name.lower().startswith("nvidia") else f"NVIDIA {name} {gib}GB")
    if known:
        return known.slug
    slug = slugify(name)
    return slug if slug.startswith("nvidia") else f"nvidia-{slug}"


def _cuda(index: int) -> DeviceInfo:
    import torch

    if index >= torch.cuda.device_count():
        raise MachineError(f"device cuda:{index} is not there: torch sees {torch.cuda.device_count()} CUDA GPUs")
    properties = torch.cuda.get_device_properties(index)
    board = Jetson().model
    name, memory = board or properties.name, properties.total_memory
    return DeviceInfo(
        slug=_gpu_slug(name, memory),
        title=name,
        kind="cuda",
        memory_bytes=memory,
        cores=properties.multi_processor_count,
        llc_bytes=getattr(properties, "L2_cache_size", 0),
        driver=_driver(),
        arch=f"sm_{properties.major}{properties.minor}",
        unified_memory=bool(board),
    )


def _driver() -> str:
    """The GPU driver's version, or "" where NVML does not tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:
        return ""


def _nvml() -> DeviceInfo | None:
    """The first GPU by NVML, or None. Multiprocessors and cache are unknown to NVML: 0."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = str(pynvml.nvmlDeviceGetName(handle))
        memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except Exception:
        # NVML is absent, or a library without a driver; both mean that no GPU is to be seen here.
        return None
    return DeviceInfo(_gpu_slug(name), name, "cuda", memory, 0, 0, _driver(), f"sm_{major}{minor}")


def _cpu() -> DeviceInfo:
    name = _cpu_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DeviceInfo(
        slug=f"{slugify(name)}-{cores}c",
        title=name,
        kind="cpu",
        memory_bytes=_memory_bytes(),
        cores=cores,
        llc_bytes=_llc_bytes(),
        driver="",
        arch=platform.machine(),
    )


def _cpu_name() -> str:
    """The processor's marketing name; where there is none (many ARM boards), the architecture's."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine() or "cpu"


def _memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    for path in _MEMORY_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):
            continue
    return total


LLC_BYTES_PER_CPU = 32 << 20
"""The most last-level cache that any processor has for one core. A virtual machine of few cores shows all of its
host's, which its neighbours fill."""


def _llc_bytes() -> int:
    """Size of the highest cache level of the first CPU, as far as it can be ours; 0 if the system does not tell."""
    levels: dict[int, int] = {}
    try:
        for folder in _CACHES.glob("index*"):
            size = (folder / "size").read_text().strip()
            scale = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
            levels[int((folder / "level").read_text())] = int(size.rstrip("KM")) * scale
    except (OSError, ValueError):
        return 0
    return min(levels[max(levels)], LLC_BYTES_PER_CPU * (os.cpu_count() or 1)) if levels else 0
