"""Where a number comes from: versions, device, threads, command and time. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import tokenize
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nasbench import __version__


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What every measured row and report carries.

    Attributes:
        device: slug of the device, "" where none matters.
        torch, triton: versions; "" where a package is absent.
        driver: version of the GPU driver, "" on a CPU.
        project: version of nasbench.
        kernels: version of its GPU kernels.
        threads: CPU threads that torch uses, or those of this process where torch is not loaded.
        command: what ran, as one would type it.
        measured_utc: the time, as 2026-11-30T12:00:00Z.
    """

    device: str
    torch: str
    triton: str
    driver: str
    project: str
    kernels: str
    threads: int
    command: str
    measured_utc: str

    def cells(self, *names: str) -> dict[str, Any]:
        """Some of the fields, as the keyword arguments of a row."""
        return {name: getattr(self, name) for name in names}


def utc_now() -> str:
    """The time now, as 2026-11-30T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def version_of(package: str) -> str:
    """The version of a package. A loaded module is asked first: only it names its CUDA version."""
    loaded = getattr(sys.modules.get(package), "__version__", "")
    if loaded:
        return str(loaded)
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


_BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)


@cache
def kernels_version() -> str:
    """Eight digits that differ between kernels of different code. Comments, docstrings, white space, naive forms and
    the tuner do not count. "" without the package."""
    spec, digest = find_spec("nasbench_kernels"), hashlib.sha256()
    folders = spec.submodule_search_locations if spec else None
    for path in sorted(path for folder in folders or () for path in Path(folder).rglob("*.py")):
        if path.name == "naive.py" or path.parent.name == "tune":
            continue
        with path.open("rb") as file:
            begins = True
            for token in tokenize.tokenize(file.readline):
                if token.type not in _BLANK and not (begins and token.type == tokenize.STRING):
                    # Without white space: Python 3.12 reads an f-string as several tokens, 3.11 as one.
                    digest.update("".join(token.string.split()).encode())
                begins = token.type in _BLANK
    return digest.hexdigest()[:8] if folders else ""


def command_line() -> str:
    """The command of this process, its program without its folder."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return shlex.join(["nasbench" if name in ("", "-c", "__main__.py") else name, *sys.argv[1:]])


def provenance(device: str = "", driver: str = "") -> Provenance:
    """The provenance of what is measured now.

    Args:
        device, driver: of `nasbench.devices.detect(...)`: its slug and driver.
    """
    torch = sys.modules.get("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Provenance(
        device=device,
        torch=version_of("torch"),
        triton=version_of("triton"),
        driver=driver,
        project=__version__,
        kernels=kernels_version(),
        threads=torch.get_num_threads() if torch else cores,
        command=command_line(),
        measured_utc=utc_now(),
    )
