"""What the benchmarks share: the need for a GPU, exit codes, provenance, JSON files, errors against a reference."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nasbench.core.provenance
from nasbench.core.errors import MachineError, NasbenchError
from nasbench.core.files import strict_json
from nasbench.devices import detect

# In a script's own folder, kernels.py is what other libraries take for the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

BEYOND_CACHE = 200e6
"""Bytes that the buffer sets of a measurement exceed together: four times the L2 cache of an H100."""


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every result to a file")
    return parser


def run(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None
) -> int:
    """The exit code of `work`, or of the error that ended it: 2 for bad input, 1 for what the machine lacks."""
    options = parser.parse_args(arguments)
    try:
        return work(options)
    except NasbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def need_gpu() -> None:
    """Raises MachineError where there is none."""
    if not torch.cuda.is_available():
        raise MachineError("no CUDA GPU here: this benchmark measures one")


def provenance() -> dict[str, Any]:
    """Device, versions, command and time of a measurement on the GPU."""
    info = detect("cuda")
    return asdict(nasbench.core.provenance.provenance(info.slug, info.driver))


def write_json(path: Path | None, value: object) -> None:
    """Writes the file, if one is asked for."""
    if path:
        path.write_text(strict_json(value) + "\n", encoding="utf-8")


def relative_rmse(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))


def worst(errors: Sequence[float]) -> float:
    """The largest, or NaN if there is one: max() may drop it."""
    return float(torch.tensor(errors).max())


def sets_of(nbytes: float) -> int:
    """Sets of buffers of this size that exceed the cache together."""
    return max(1, math.ceil(BEYOND_CACHE / nbytes))
