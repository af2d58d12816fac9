"""The device's own limits, measured: copy and read bandwidth, matrix products, the cost of a launch.

Every row's fractions are of these, not of a data sheet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from nasbench.core.dtypes import dtype_name
from nasbench.profiling.measure import Machine, implementation, stamp, time_calls
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import ceiling_work
from nasbench.runtime.timing import Call
from nasbench.store import CEILING, CEILINGS, Row, select

LAUNCHES = 200
"""Tiny operations in one timed run of the launch ceiling."""


def _row(machine: Machine, name: str, dtype: str, calls: Sequence[Call], nbytes: int = 0, flops: int = 0) -> Row:
    """The row of a ceiling whose calls move bytes or do operations."""
    each, timed = time_calls(machine, calls)
    cells: dict[str, Any] = {**timed, **stamp(machine)}
    cells |= {"gb_s": nbytes / each.p50_us / 1e3} if nbytes else {}
    cells |= {"tflop_s": flops / each.p50_us / 1e6} if flops else {}
    how = implementation(machine.info.kind, "decode")
    return Row(device=machine.info.slug, block=CEILING, args=name, dtype=dtype, implementation=how, **cells)


def measure_ceilings(machine: Machine, dtype: torch.dtype) -> list[Row]:
    """Four rows: copy and read (fp32), launch (fp32), and the matrix product in `dtype`."""
    rows = []
    with torch.inference_mode():
        for name, work, nbytes, flops in ceiling_work(machine.device, free_bytes(machine.device), dtype):
            if name in CEILINGS:
                rows.append(_row(machine, name, dtype_name(dtype) if flops else "fp32", [work], nbytes, flops))
        tiny = torch.zeros(8, device=machine.device)
        rows.append(_row(machine, "launch", "fp32", [partial(tiny.add_, 1.0)] * LAUNCHES))
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
