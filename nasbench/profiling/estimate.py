"""Rows of a device that is not at hand, by roofline: bytes and operations of a block over the data sheet's figures,
with the efficiencies that measured devices reach.

    time = launch + max(bytes / (bandwidth * memory efficiency), operations / (rate * compute efficiency))

Launch, memory and compute efficiency are learned for each block and mode from the measured rows of GPUs whose data
sheets are known. The error bar is the rule's error on groups of measured rows that it was not shown: whole devices
where several were measured, else one batch size of one model at a time, which says nothing of how devices differ.

Estimates carry the source `estimated` wherever they go and never take the place of a measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from nasbench.core.dtypes import torch_dtype
from nasbench.core.errors import UserError, unknown
from nasbench.core.provenance import provenance
from nasbench.devices import DEVICES, DeviceInfo, DeviceSpec
from nasbench.model.shapes import ModelSpec
from nasbench.profiling.amounts import amounts
from nasbench.profiling.measure import point_cells
from nasbench.profiling.plan import Point
from nasbench.profiling.workload import NO_CALL, Bench
from nasbench.store import CEILING, Row, block_spec

PERCENTILE_SD = 0.8416
"""p20 and p80 of a normal distribution lie this many standard deviations from its middle."""
LEAST_ERROR = 0.05
"""Left-out groups may agree by chance."""
UNTESTED_ERROR = 0.5
"""Relative error of a rule that no group could be left out of."""
FITS = 12
"""Times that rows are assigned to a bound and the efficiencies fitted anew."""
CEILING_BYTES = 1 << 30
"""What a ceiling's estimated time is for."""


@dataclass(frozen=True)
class Sample:
    """A measured row as the roofline sees it: least times by the data sheet, in microseconds."""

    group: tuple[Any, ...]
    device: str
    memory_us: float
    compute_us: float
    us: float


@dataclass(frozen=True)
class Roofline:
    """The rule of one block and mode.

    Attributes:
        launch_us: what is there without any work.
        memory, compute: efficiencies, shares of the data sheet's figures.
        error: relative, of left-out groups.
        rows, devices: what it was learned from.
    """

    launch_us: float
    memory: float
    compute: float
    error: float = UNTESTED_ERROR
    rows: int = 0
    devices: tuple[str, ...] = ()

    def time_us(self, memory_us: float, compute_us: float) -> tuple[float, str]:
        """(microseconds, what binds: memory, compute or launch) for the least times by the data sheet."""
        bound = {"memory": memory_us / self.memory, "compute": compute_us / self.compute}
        largest = max(bound, key=lambda name: bound[name])
        return self.launch_us + bound[largest], "launch" if self.launch_us > bound[largest] else largest


def samples(rows: Iterable[Row], dtype: str) -> dict[tuple[str, str], list[Sample]]:
    """The measured rows of known devices by (block, mode)."""
    found: dict[tuple[str, str], list[Sample]] = {}
    for row in rows:
        usable = row.status == "ok" and row.source == "measured" and row.dtype == dtype and row.block != CEILING
        if not usable or row.device not in DEVICES or not row.p50_us or row.gb_s is None or row.tflop_s is None:
            continue
        spec = DEVICES[row.device]
        memory_us, compute_us = row.gb_s * row.p50_us / spec.bandwidth_gb_s, row.tflop_s * row.p50_us / spec.tflop_s
        sample = Sample((row.hidden_size, row.batch), row.device, memory_us, compute_us, row.p50_us)
        found.setdefault((row.block, row.mode), []).append(sample)
    return found


def _solve(x: np.ndarray) -> np.ndarray:
    """Non-negative w with the least relative error of x @ w against 1: the best of all subsets of the columns."""
    columns = [i for i in range(x.shape[1]) if x[:, i].any()]
    best, least = np.zeros(x.shape[1]), np.inf
    for size in range(1, len(columns) + 1):
        for chosen in combinations(columns, size):
            solution = np.linalg.lstsq(x[:, chosen], np.ones(len(x)), rcond=None)[0]
            error = float(((x[:, chosen] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(x.shape[1]), error
                best[list(chosen)] = solution
    return best


def _fit(found: Sequence[Sample]) -> Roofline:
    """Launch and efficiencies; an efficiency that no row shows is that of the other."""
    us = np.array([sample.us for sample in found])
    memory = np.array([sample.memory_us for sample in found])
    compute = np.array([sample.compute_us for sample in found])
    inverse = np.array([1.5, 1.5])
    weights = np.zeros(3)
    for _ in range(FITS):
        in_memory = memory * inverse[0] >= compute * inverse[1]
        x = np.stack([np.ones(len(us)), np.where(in_memory, memory, 0), np.where(in_memory, 0, compute)], axis=1)
        weights = _solve(x / us[:, None])
        shown = weights[1:] > 0
        inverse = np.where(shown, weights[1:], weights[1:][shown].max() if shown.any() else 1.0)
    return Roofline(float(weights[0]), float(1 / inverse[0]), float(1 / inverse[1]))


def learn(found: Sequence[Sample]) -> Roofline:
    """The rule of these rows, with the error that it has on groups it was not shown."""
    devices = tuple(sorted({sample.device for sample in found}))
    group_of = [sample.device if len(devices) > 1 else sample.group for sample in found]
    errors: list[float] = []
    for group in set(group_of) if len(set(group_of)) > 1 else ():
        rule = _fit([sample for sample, own in zip(found, group_of, strict=True) if own != group])
        left_out = [sample for sample, own in zip(found, group_of, strict=True) if own == group]
        errors += [rule.time_us(sample.memory_us, sample.compute_us)[0] / sample.us - 1 for sample in left_out]
    error = max(LEAST_ERROR, float(np.sqrt(np.mean(np.square(errors))))) if errors else UNTESTED_ERROR
    return replace(_fit(found), error=error, rows=len(found), devices=devices)


class Estimator:
    """Rules of every block and mode, learned from measured rows.

    Args:
        rows: of any devices; those of GPUs without a data sheet, and of other data types, are left out.
        dtype: bf16 or fp16, whose rate data sheets state.

    Raises:
        UserError: another dtype, or no measured rows to learn from.
    """

    def __init__(self, rows: Iterable[Row], dtype: str = "bf16") -> None:
        if dtype not in ("bf16", "fp16"):
            raise unknown("dtype of an estimate", dtype, ("bf16", "fp16"))
        rows = list(rows)
        self.dtype = dtype
        found = samples(rows, dtype)
        if not found:
            raise UserError(f"nothing to estimate from: no measured {dtype} rows of a GPU whose data sheet is known")
        self.rules = {key: learn(group) for key, group in found.items()}
        # A kind that nobody measured is taken for the average of its mode, kinds and shared blocks alike.
        modes = {mode for _, mode in found}
        every = {mode: [s for key, group in found.items() if key[1] == mode for s in group] for mode in modes}
        self._pooled = {mode: learn(group) for mode, group in every.items()}
        self._ceilings = [
            row
            for row in rows
            if row.block == CEILING and row.status == "ok" and row.source == "measured" and row.device in DEVICES
        ]

    def rule(self, block: str, mode: str) -> Roofline:
        """Raises UserError where the mode was measured on no device."""
        if mode not in self._pooled:
            raise UserError(f"nothing to estimate {mode} from: no measured {self.dtype} rows of it")
        return self.rules.get((block, mode)) or self._pooled[mode]

    def rows(self, spec: DeviceSpec, shape: ModelSpec, points: Iterable[Point]) -> list[Row]:
        """Estimated rows of the points on a device, its ceilings first."""
        info = DeviceInfo(spec.slug, spec.title, "cuda", spec.memory_bytes, 0, 0, "", spec.arch)
        bench = Bench(shape, "cuda", torch_dtype(self.dtype), 0, 0)
        return [*self._ceiling_rows(spec), *(self._row(spec, info, bench, point) for point in points)]

    def _row(self, spec: DeviceSpec, info: DeviceInfo, bench: Bench, point: Point) -> Row:
        width = bench.dtype.itemsize
        moved, flops = amounts(bench.shape, point, width)
        cells, block = point_cells(bench, info, point), block_spec(bench.shape, point.block)
        rule = self.rule(cells["block"], point.mode)
        if (point.block, point.mode, point.batch) == ("norm", "decode", 1):
            return Row(**cells, **_times(0.0, 0.0), reason=NO_CALL, **_provenance())
        us, bound = rule.time_us(moved / spec.bandwidth_gb_s / 1e3, flops / spec.tflop_s / 1e6)
        caches: dict[str, Any] = {}
        if block is not None and not point.shared:
            caches["cache_formula_bytes"] = block.cache_bytes(point.batch, point.context, width)
            caches["conv_state_bytes"] = block.conv_state_bytes(point.batch, width)
        reason = f"{bound}-bound, +-{rule.error:.0%}, from {rule.rows} rows of {', '.join(rule.devices)}"
        return Row(
            **cells, **_times(us, rule.error), **caches,
            gb_s=moved / us / 1e3, tflop_s=flops / us / 1e6, reason=reason, **_provenance(),
        )  # fmt: skip

    def _ceiling_rows(self, spec: DeviceSpec) -> list[Row]:
        """The mean share of its data sheet that measured devices reach; the launch takes what it takes there."""
        found = []
        for args, dtype, figure in (
            ("copy", "fp32", "gb_s"),
            ("read", "fp32", "gb_s"),
            ("matmul", self.dtype, "tflop_s"),
            ("launch", "fp32", ""),
        ):
            rows = [row for row in self._ceilings if (row.args, row.dtype) == (args, dtype)]
            if not rows:
                continue
            sheet = {"gb_s": "bandwidth_gb_s", "tflop_s": "tflop_s"}.get(figure, "")
            values: list[float] = [
                getattr(row, figure) / getattr(DEVICES[row.device], sheet) if figure else row.p50_us or 0.0
                for row in rows
            ]
            mean = float(np.mean(values))
            error = max(LEAST_ERROR, float(np.std(values) / mean)) if len(values) > 1 else UNTESTED_ERROR
            rate = mean * getattr(spec, sheet) if figure else 0.0
            us = CEILING_BYTES / rate / 1e3 if figure == "gb_s" else 2 * 8192**3 / rate / 1e6 if figure else mean
            cells: dict[str, Any] = {figure: rate} if figure else {}
            reason = f"share of the data sheet, from {', '.join(sorted({row.device for row in rows}))}"
            cells |= {"device": spec.slug, "block": CEILING, "args": args, "dtype": dtype}
            cells |= {"implementation": "cuda-graph", "reason": reason, **_times(us, error), **_provenance()}
            found.append(Row(**cells))
        return found


def _times(us: float, error: float) -> dict[str, Any]:
    """p20, p50 and p80 of an error that is a factor: never negative."""
    factor = 1 + PERCENTILE_SD * error
    return {"p20_us": us / factor, "p50_us": us, "p80_us": us * factor}


def _provenance() -> dict[str, Any]:
    return {"source": "estimated", **provenance().cells("project", "torch", "measured_utc")}
