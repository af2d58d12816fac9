"""Measuring in this process."""

from __future__ import annotations

import gc
from dataclasses import replace

from nasbench.profiling.ceilings import measure_ceilings
from nasbench.profiling.measure import Machine, measure
from nasbench.profiling.plan import Point
from nasbench.profiling.workload import Bench
from nasbench.runtime.timing import Budget
from nasbench.store import Row


class InProcess:
    """Measures in this process: nothing to start, nothing survived. The other way is worker.Worker."""

    def __init__(self, machine: Machine, bench: Bench) -> None:
        self.machine = machine
        self.bench = bench
        gc.collect()
        gc.freeze()  # every collection before a row would go through what is loaded by now

    def ceilings(self) -> list[Row]:
        return measure_ceilings(self.machine, self.bench.dtype)

    def measure(self, point: Point, budget: Budget) -> Row:
        return measure(replace(self.machine, budget=budget), self.bench, point)

    def new_group(self) -> None:
        self.bench.pool.clear()

    close = new_group

    def start_ahead(self) -> None:
        """Nothing to start."""
