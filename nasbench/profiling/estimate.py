"""Rows of a device that is not at hand, from the measured rows of another one.

    roofline = max(bytes / read ceiling, operations / matmul ceiling)
    target   = roofline on the target + (measured - roofline on the source) x scale

The target's ceilings are its data sheet's figures times the shares that the source reaches of its own. What a block
needs beyond its roofline is launches and latency where memory binds it: bandwidth does not shorten them, `scale` is 1.
Where the products bind it, it is inefficiency, which the target has too: `scale` is the ratio of the rooflines.

The error bar grows with what the rule assumes. Two extremes are possible: all of the time beyond the roofline scales,
or none of it. The standard deviation is a share of the distance between them. ERROR and SHARE are fitted to two
measured devices of one architecture, an H100 and an H200, each predicted from the other (reports/estimates). No
measured pair shows what another architecture changes: ELSEWHERE is a guess.

Estimates carry the source `estimated` wherever they go and never take the place of a measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np

from nasbench.core.errors import UserError
from nasbench.core.provenance import provenance
from nasbench.devices import DeviceSpec
from nasbench.store import CEILING, Row

ERROR, SHARE = 0.03, 0.18
"""Standard deviation of an estimate of the same architecture: the first, and this share of the logarithm of the two
extremes' ratio."""
ELSEWHERE = 0.15
"""Standard deviation that another architecture adds."""
PERCENTILE_SD, INTERVAL_SD = 0.8416, 1.645
"""p20 and p80 of a normal distribution, and the ends of its 90 % interval, lie this many standard deviations from its
middle."""
DTYPES = ("bf16", "fp16")
"""Data sheets state the rate of these."""


@dataclass(frozen=True)
class Checked:
    """An estimated row beside a measured one of the same key, microseconds.

    Attributes:
        error: estimated / measured - 1.
        inside: whether the 90 % interval of the estimate holds the measurement.
    """

    block: str
    args: str
    hidden_size: int
    mode: str
    batch: int
    context: int
    chunk: int
    estimated_us: float
    measured_us: float
    error: float
    inside: bool


def check(estimates: Iterable[Row], measured: Iterable[Row]) -> list[Checked]:
    """Compares estimates of a device with its measurements, ceilings left out."""
    known = {row.key: row for row in measured if row.status == "ok" and row.source == "measured"}
    names = ("block", "args", "hidden_size", "mode", "batch", "context", "chunk")
    found = []
    for row in estimates:
        real = known.get(row.key)
        if real is None or row.block == CEILING or not row.p50_us or not real.p50_us or not row.p80_us:
            continue
        half = (row.p80_us / row.p50_us) ** (INTERVAL_SD / PERCENTILE_SD)
        ratio = row.p50_us / real.p50_us
        cells = {name: getattr(row, name) for name in names}
        found.append(
            Checked(
                **cells,
                estimated_us=row.p50_us,
                measured_us=real.p50_us,
                error=ratio - 1,
                inside=1 / half <= ratio <= half,
            )
        )
    return found


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: 10^9 bytes and 10^12 operations per second."""

    read_gb_s: float
    matmul_tflop_s: float

    def least_us(self, row: Row) -> tuple[float, float]:
        """Least microseconds for the bytes and for the operations of a measured row."""
        assert row.p50_us is not None
        memory, compute = (row.gb_s or 0.0) / self.read_gb_s, (row.tflop_s or 0.0) / self.matmul_tflop_s
        return row.p50_us * memory, row.p50_us * compute


def estimate(rows: Iterable[Row], source: DeviceSpec, target: DeviceSpec) -> list[Row]:
    """Rows of the target, one for every measured row of the source that ran; its ceilings too.

    Raises:
        UserError: no measured rows of the source in bf16 or fp16.
    """
    usable = [row for row in rows if (row.device, row.source, row.status) == (source.slug, "measured", "ok")]
    if not any(row.dtype in DTYPES and row.block != CEILING for row in usable):
        raise UserError(f"nothing to estimate from: no measured {' or '.join(DTYPES)} rows of {source.slug}")
    reached = {row.args: row.gb_s or row.tflop_s or 0.0 for row in usable if row.block == CEILING}
    here = Ceilings(reached.get("read", source.bandwidth_gb_s), reached.get("matmul", source.tflop_s))
    there = Ceilings(
        here.read_gb_s / source.bandwidth_gb_s * target.bandwidth_gb_s,
        here.matmul_tflop_s / source.tflop_s * target.tflop_s,
    )
    found = []
    for row in usable:
        if row.block == CEILING:
            found.append(_ceiling(row, source, target))
        elif row.dtype in DTYPES and not row.p50_us:  # its work is part of other blocks' kernels
            found.append(_row(row, target, 0.0, 0.0, row.reason))
        elif row.dtype in DTYPES:
            found.append(_transfer(row, source, target, here, there))
    return found


def _transfer(row: Row, source: DeviceSpec, target: DeviceSpec, here: Ceilings, there: Ceilings) -> Row:
    assert row.p50_us is not None
    memory, compute = here.least_us(row)
    least, other = max(memory, compute), max(there.least_us(row))
    none_scales, all_scales = other + max(row.p50_us - least, 0.0), row.p50_us * other / least
    us, bound = (none_scales, "memory") if memory >= compute else (all_scales, "compute")
    sd = float(np.linalg.norm([ERROR, SHARE * log(none_scales / all_scales), _elsewhere(source, target)]))
    reason = f"{bound}-bound and {row.p50_us / least:.2f} x its roofline on {source.slug}"
    return _row(row, target, us, sd, reason)


def _elsewhere(source: DeviceSpec, target: DeviceSpec) -> float:
    return 0.0 if source.arch == target.arch else ELSEWHERE


def _ceiling(row: Row, source: DeviceSpec, target: DeviceSpec) -> Row:
    """The share of the data sheet that the source reaches; a launch takes what it takes there."""
    scale = {"matmul": target.tflop_s / source.tflop_s, "launch": 1.0}.get(
        row.args, target.bandwidth_gb_s / source.bandwidth_gb_s
    )
    sd = float(np.hypot(ERROR, _elsewhere(source, target)))
    return _row(row, target, (row.p50_us or 0.0) / scale, sd, f"share of the data sheet that {source.slug} reaches")


def _row(row: Row, target: DeviceSpec, us: float, sd: float, reason: str) -> Row:
    """The row on the target. Its error is a factor: p20 is never negative."""
    factor = float(np.exp(PERCENTILE_SD * sd))
    faster = (row.p50_us or 0.0) / us if us else 1.0
    rates: dict[str, Any] = {
        name: None if (value := getattr(row, name)) is None else value * faster for name in ("gb_s", "tflop_s")
    }
    return replace(
        row, device=target.slug, p20_us=us / factor, p50_us=us, p80_us=us * factor, repeats=None, noisy=None,
        **rates, bandwidth_fraction=None, compute_fraction=None, power_w=None, energy_j=None, sm_clock_mhz=None,
        numa_node=None, mem_clock_mhz=None, temperature_c=None, throttled=None, throttle_reasons="", reason=reason,
        source="estimated", driver="", kernels="", **provenance().cells("torch", "project", "measured_utc"),
    )  # fmt: skip
