"""`nasbench doctor`: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import typer

from nasbench.cli.common import AsJson

LEAST_MEMORY, LEAST_DISK = 4 << 30, 5 << 30
"""Free bytes below which the default model's quickstart may not end."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        state: "ok"; "note" for what is slower or missing by choice; "bad" for what stops commands.
        mend: what to do about it, "" where nothing is to be done.
    """

    what: str
    state: str
    found: str
    mend: str = ""


def command(as_json: AsJson = False) -> None:
    """Check GPU, driver, torch, triton, NVML, memory and disk; say how to mend what is missing. Exit code 1 where
    something stops commands."""
    from nasbench.cli.common import print_json, print_table

    findings = examine()
    bad = any(finding.state == "bad" for finding in findings)
    if as_json:
        print_json({"ok": not bad, "findings": [asdict(finding) for finding in findings]})
    else:
        print_table(("", "what", "found"), [(each.state, each.what, each.found) for each in findings])
        for finding in findings:
            if finding.mend:
                print(f"\n{finding.what}: {finding.mend}")
    if bad:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Everything that the doctor looks at."""
    import torch

    from nasbench.core.provenance import version_of
    from nasbench.core.sizes import cache_dir
    from nasbench.devices import detect
    from nasbench.devices.dtype import faster_dtype

    cpu = detect("cpu")
    findings = [Finding("nasbench", "ok", f"{version_of('nasbench')}, torch {torch.__version__}")]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = torch.get_num_threads()
    findings.append(
        Finding("cpu", "ok", f"{cpu.title}, {cpu.cores} cores, {threads} threads, {faster_dtype('cpu')} is faster")
    )
    if load > cpu.cores / 2:
        mend = "other programs use the processor: measurements become noisy and take longer"
        findings.append(Finding("load", "note", f"{load:.1f} on {cpu.cores} cores", mend))
    findings += _gpu(torch.cuda.is_available(), torch.version.cuda)
    findings += [_package(*each) for each in _PACKAGES]
    findings.append(_space("memory", _free_memory(), LEAST_MEMORY, "close other programs, or choose a smaller model"))
    for what, folder in (("disk here", Path.cwd()), ("disk of the cache", cache_dir())):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = _space(what, shutil.disk_usage(there).free, LEAST_DISK, "free some, or set NASBENCH_CACHE")
        writable = os.access(there, os.W_OK)
        findings.append(free if writable else Finding(what, "bad", f"{there} cannot be written", "change its rights"))
    return findings


_PACKAGES = (
    ("triton", "kernels for CUDA GPUs", "pip install triton; without a GPU nothing needs it"),
    ("fla", "fla-core, whose kernels L and K take on a GPU", "pip install 'nasbench[fla]'"),
    ("huggingface_hub", "models and data sets by hub name", "pip install 'nasbench[hub]'"),
    ("tensorboard", "training curves in TensorBoard", "pip install 'nasbench[tensorboard]'"),
    ("pynvml", "clocks, power and throttling of NVIDIA GPUs", "pip install nvidia-ml-py"),
)


def _package(name: str, use: str, mend: str) -> Finding:
    if find_spec(name) is None:
        return Finding(name, "note", f"not installed: {use}", mend)
    return Finding(name, "ok", use)


def _gpu(usable: bool, cuda: str | None) -> list[Finding]:
    """The GPU, its driver, and whether torch can use what NVML sees."""
    from nasbench.devices import detect
    from nasbench.profiling.telemetry import Telemetry

    seen = detect("auto")
    if not usable:
        if seen.kind != "cuda":
            return [Finding("gpu", "note", "none: everything runs on the CPU")]
        mend = (
            f"this torch has no CUDA: pip install torch from https://pytorch.org for driver {seen.driver}"
            if cuda is None
            else f"torch is built for CUDA {cuda}: update driver {seen.driver}, or look at CUDA_VISIBLE_DEVICES"
        )
        return [Finding("gpu", "bad", f"{seen.title} is there, and torch cannot use it", mend)]
    info, telemetry = detect("cuda"), Telemetry("cuda")
    driver = f"driver {info.driver or 'unknown'}, CUDA {cuda}, {info.memory_bytes / 2**30:.0f} GiB"
    found = [Finding("gpu", "ok", f"{info.slug} ({info.title}), {info.arch}, {driver}")]
    if telemetry.missing:
        found.append(Finding("nvml", "note", telemetry.missing, "pip install nvidia-ml-py; rows then have power"))
    return found


def _space(what: str, free: int, least: int, mend: str) -> Finding:
    state = "ok" if free >= least else "note"
    return Finding(what, state, f"{free / 2**30:.1f} GiB free", "" if state == "ok" else mend)


def _free_memory() -> int:
    from nasbench.runtime.memory import free_bytes

    return free_bytes("cpu")
