"""The device's own limits, measured: copy and read bandwidth, matrix products, the cost of a launch.

Every row's fractions are of these, not of a data sheet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from nasbench.core.dtypes import dtype_name
from nasbench.profiling.measure import Machine, implementation, stamp, time_calls
from nasbench.profiling.timing import Call
from nasbench.runtime.roofline import MATRIX
from nasbench.store import CEILING, Row, is_noisy, select

LAUNCHES = 200
"""Tiny operations in one timed run of the launch ceiling."""


def _buffer_bytes(machine: Machine) -> int:
    """Far larger than the last-level cache, and no more than a tenth of the memory."""
    wanted = max(64 << 20, 4 * machine.info.llc_bytes, (1 << 30) if machine.info.kind == "cuda" else 0)
    return min(wanted, machine.info.memory_bytes // 10) if machine.info.memory_bytes else wanted


def _row(machine: Machine, args: str, dtype: str, calls: Sequence[Call], amount: dict[str, float]) -> Row:
    """`amount` is what one call does: bytes under "gb_s", operations under "tflop_s"."""
    each, telemetry = time_calls(machine, calls)
    cells: dict[str, Any] = {**asdict(each), **telemetry, **stamp(machine)}
    cells["noisy"] = is_noisy(each.p20_us, each.p50_us, each.p80_us)
    cells |= {name: count / each.p50_us / {"gb_s": 1e3, "tflop_s": 1e6}[name] for name, count in amount.items()}
    how = implementation(machine.info.kind, "decode")
    return Row(device=machine.info.slug, block=CEILING, args=args, dtype=dtype, implementation=how, **cells)


def measure_ceilings(machine: Machine, dtype: torch.dtype) -> list[Row]:
    """Four rows: copy and read (fp32), launch (fp32), and the matrix product in `dtype`."""
    with torch.inference_mode():
        elements = _buffer_bytes(machine) // 4
        x = torch.randn(elements, device=machine.device)
        y = torch.empty_like(x)
        total = torch.empty((), device=machine.device)
        # A multiplication is a kernel on every device; copy_ in a CUDA graph becomes a slower memory-copy node.
        copy = partial(torch.mul, x, 1.0, out=y)
        read = partial(torch.sum, x, out=total, dim=None, dtype=torch.float32)
        rows = [
            _row(machine, "copy", "fp32", [copy], {"gb_s": 8.0 * elements}),
            _row(machine, "read", "fp32", [read], {"gb_s": 4.0 * elements}),
        ]
        del x, y
        size = MATRIX.of(machine.info.kind)
        a, b = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        rows.append(_row(machine, "matmul", dtype_name(dtype), [product], {"tflop_s": 2.0 * size**3}))
        tiny = torch.zeros(8, device=machine.device)
        rows.append(_row(machine, "launch", "fp32", [partial(tiny.add_, 1.0)] * LAUNCHES, {}))
    return rows


def known_ceilings(rows: Iterable[Row], dtype: str) -> list[Row]:
    """Those of `rows` that `measure_ceilings` would measure; complete when there are four."""
    found = select(rows, block=CEILING, status="ok", source="measured")
    return [row for row in found if row.args != "matmul" or row.dtype == dtype]


def use_ceilings(machine: Machine, rows: Iterable[Row]) -> None:
    """Gives the machine its ceilings, for the fractions of the rows that follow."""
    for row in rows:
        if row.args == "read":
            machine.read_gb_s = row.gb_s
        elif row.args == "matmul" and row.tflop_s is not None:
            machine.matmul_tflop_s[row.dtype] = row.tflop_s
