"""Times of one block over context and batch, interpolated between the measured points.

Between them the time is piecewise linear in the context and in the batch: a step moves bytes and computes products in
proportion to both, and the constant part of each segment is what the launches and the weights cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nasbench.core.sizes import format_size
from nasbench.store import Row

SPREAD_SD = 1.683
"""p80 - p20 of a normal distribution over its standard deviation."""


@dataclass(frozen=True)
class Time:
    """Microseconds of one block or of several.

    Attributes:
        estimated: whether an estimated row is in them.
        stale: whether a row of other kernels than the installed ones is.
        sd_us: standard deviation, from p20 and p80 of the rows: scatter of measured ones, error bar of estimates.
        joules: energy; None where a row does not tell.
        host_us: what the host needs to launch it; 0 where it runs from a captured graph, or on a CPU.
    """

    us: float
    estimated: bool = False
    sd_us: float = 0.0
    joules: float | None = None
    host_us: float = 0.0
    stale: bool = False

    def __mul__(self, factor: float) -> Time:
        joules = None if self.joules is None else self.joules * factor
        return Time(self.us * factor, self.estimated, self.sd_us * factor, joules, self.host_us * factor, self.stale)

    def scaled(self, factor: float) -> Time:
        """The time of as many launches with `factor` times the work."""
        return replace(self * factor, host_us=self.host_us)

    def __add__(self, other: Time) -> Time:
        """The sum of times whose errors are correlated: they are of the same rows."""
        joules = None if self.joules is None or other.joules is None else self.joules + other.joules
        estimated, host_us = self.estimated or other.estimated, self.host_us + other.host_us
        stale = self.stale or other.stale
        return Time(self.us + other.us, estimated, self.sd_us + other.sd_us, joules, host_us, stale)


NOTHING = Time(0.0, joules=0.0)


def total(times: Iterable[Time]) -> Time:
    """The sum of times whose errors are correlated."""
    return sum(times, start=NOTHING)


def of_row(row: Row) -> Time:
    """The time of a row."""
    assert row.p20_us is not None
    assert row.p50_us is not None
    assert row.p80_us is not None
    energy_j = row.energy_j if row.p50_us else 0.0
    sd_us = (row.p80_us - row.p20_us) / SPREAD_SD
    return Time(row.p50_us, row.source == "estimated", sd_us, energy_j, row.host_us or 0.0, row.stale)


def _bracket(known: Sequence[int], at: int, extrapolate: bool) -> tuple[int, int, float] | None:
    """Neighbours of `at` in the sorted `known` and the weight of the second, or None where none are legal."""
    right = bisect_left(known, at)
    if right < len(known) and known[right] == at:
        return known[right], known[right], 0.0
    if not 0 < right < len(known):
        if not extrapolate or len(known) < 2:
            return None
        right = min(max(right, 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    return low, high, (at - low) / (high - low)


def _along(line: dict[int, Time], at: int, extrapolate: bool) -> Time | None:
    bracket = _bracket(sorted(line), at, extrapolate)
    return blend(line[bracket[0]], line[bracket[1]], bracket[2]) if bracket else None


def blend(low: Time, high: Time, weight: float) -> Time:
    """Linear between two points, and beyond them."""
    inside = min(max(weight, 0.0), 1.0)
    joules = None
    if low.joules is not None and high.joules is not None:
        joules = max(0.0, low.joules + weight * (high.joules - low.joules))
    return Time(
        max(0.0, low.us + weight * (high.us - low.us)),
        low.estimated or high.estimated,
        low.sd_us + inside * (high.sd_us - low.sd_us),
        joules,
        low.host_us + inside * (high.host_us - low.host_us),
        low.stale or high.stale,
    )


class Table:
    """Times of one block over context and batch.

    Args:
        repeated: batches beyond the largest measured one take that one's time again and again (prefill, where a batch
            fills the device), instead of being unknown.
    """

    def __init__(self, repeated: bool = False) -> None:
        self.points: dict[int, dict[int, Time]] = {}
        self.repeated = repeated

    def add(self, row: Row) -> None:
        """Keeps the faster one where two implementations measured the same point, measured before estimated."""
        new = of_row(row)
        old = self.points.setdefault(row.context, {}).get(row.batch)
        if old is None or (new.estimated, new.us) < (old.estimated, old.us):
            self.points[row.context][row.batch] = new

    def at(self, context: int, batch: int, extrapolate: bool) -> Time | None:
        """The time at a point, or None outside of what was measured.

        Batches first, because the largest batch that fits, and so is measured, differs between contexts.
        """
        for beyond in (False, True) if extrapolate else (False,):
            lines = {size: self._along_batches(self.points[size], batch, beyond) for size in sorted(self.points)}
            time = _along({size: line for size, line in lines.items() if line is not None}, context, beyond)
            if time:
                return time
        return None

    def _along_batches(self, line: dict[int, Time], batch: int, extrapolate: bool) -> Time | None:
        largest = max(line)
        if self.repeated and batch > largest:
            return line[largest].scaled(batch / largest)
        return _along(line, batch, extrapolate)

    def measured(self) -> str:
        """The points, for an error message: `batch 1, 4 at context 1k; batch 1 at 4k`."""
        lines = {size: ", ".join(map(str, sorted(line))) for size, line in sorted(self.points.items())}
        by_batches: dict[str, list[str]] = {}
        for size, batches in lines.items():
            by_batches.setdefault(batches, []).append(format_size(size))
        return "; ".join(
            f"batch {batches}" + (f" at context {', '.join(sizes)}" if sizes != ["0"] else "")
            for batches, sizes in by_batches.items()
        )
