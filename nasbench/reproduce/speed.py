"""Decode speed of placements, measured end to end with random weights: it depends on shapes alone.

Contexts beyond the model's own are measured with its shape extrapolated: the same layers, a longer cache.
A placement that is not measured is predicted from models of one layer kind only: the mean of their steps over its
layers, in which everything but the layers cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nasbench.core.errors import MachineError
from nasbench.model.shapes import ModelSpec
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import Ceilings, measure_ceilings
from nasbench.runtime.throughput import measure
from nasbench.search.objective import Speed
from nasbench.search.table import read_rows, write_rows
from nasbench.spaces.placement import Placement, format_placement


@dataclass(frozen=True)
class SpeedRow:
    """One measured step.

    Attributes:
        composition: how many layers of each name, which is all that the speed depends on.
        extrapolated: 1 where the context is beyond the model's own.
        floor_fraction: least time of the step at the device's measured rates / the step.
    """

    composition: str
    placement: str
    context: int
    batch: int
    decode_tok_s: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    repeats: int
    cache_bytes: int
    floor_fraction: float
    extrapolated: int
    model: str
    device: str
    dtype: str
    torch: str
    driver: str
    nasbench: str
    measured_utc: str


def composition(placement: Placement) -> str:
    """`4A 26J` of any order of these layers."""
    return " ".join(f"{placement.count(name)}{name}" for name in sorted(set(placement)))


class Speeds:
    """speeds.csv of a run."""

    def __init__(self, path: Path, shape: ModelSpec, contexts: tuple[int, ...], batches: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self.batches = dict(zip(contexts, batches, strict=True))
        self.rows = {(row.composition, row.context): row for row in read_rows(path, SpeedRow)}
        self._ceilings: Ceilings | None = None

    def measure(
        self, placement: Placement, device: str, dtype: torch.dtype, log: Callable[[str], None], seconds: float = 0.3
    ) -> None:
        """Measures the placement at every context where its composition is not known yet. What does not fit in the
        memory is told and left out."""
        for context, batch in self.batches.items():
            key = (composition(placement), context)
            if key in self.rows:
                continue
            self._ceilings = self._ceilings or measure_ceilings(device, free_bytes(device), dtype)
            longer = replace(self.shape, max_context=max(context, self.shape.max_context))
            try:
                found = measure(
                    longer, placement, context=context, batch=batch, device=device, dtype=dtype, prefill_context=None,
                    seconds=seconds, ceilings=self._ceilings,
                ).as_dict()  # fmt: skip
            except MachineError as error:
                log(f"speed of {format_placement(placement)} at {context}: {error}")
                continue
            shared = {name: found[name] for name in SpeedRow.__dataclass_fields__ if name in found}
            extrapolated = int(context > self.shape.max_context)
            self.rows[key] = SpeedRow(composition=key[0], extrapolated=extrapolated, **shared)
            write_rows(self.path, SpeedRow, [self.rows[known] for known in sorted(self.rows)])

    def of(self, placement: Placement, context: int) -> Speed | None:
        """Measured, else predicted; None where neither can be had."""
        batch = self.batches[context]
        cache = sum(config.cache_bytes(batch, context) for config in self.shape.mixers(placement))
        row = self.rows.get((composition(placement), context))
        if row is not None:
            return Speed(row.decode_tok_s, math.nan, row.step_ms, cache, "measured")
        pure = [self.rows.get((composition((name,) * len(placement)), context)) for name in placement]
        steps = [row.step_ms for row in pure if row is not None]
        if len(steps) < len(placement):
            return None
        step_ms = sum(steps) / len(steps)
        return Speed(batch / step_ms * 1e3, math.nan, step_ms, cache, "estimated")
