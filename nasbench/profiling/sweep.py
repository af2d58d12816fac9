"""A whole sweep: plan, measure what the database does not have yet, merge after every group."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

from nasbench.core.by_device import PREFILL_CHUNK, ByDevice
from nasbench.core.dtypes import dtype_name, torch_dtype
from nasbench.core.errors import UserError
from nasbench.core.files import sweep as remove_leftovers
from nasbench.core.noise import SPREAD
from nasbench.devices import DEVICES, detect_equal
from nasbench.devices.jetson import Jetson
from nasbench.model.shapes import ModelSpec
from nasbench.profiling.amounts import amounts
from nasbench.profiling.ceilings import known_ceilings, use_ceilings
from nasbench.profiling.in_process import InProcess
from nasbench.profiling.measure import Machine, point_cells
from nasbench.profiling.plan import USABLE_MEMORY, Point, plan
from nasbench.profiling.telemetry import Telemetry, unequal_clocks
from nasbench.profiling.time_budget import ROW_S, TimeBudget
from nasbench.profiling.worker import START_S, Worker
from nasbench.profiling.workload import Bench, most_instances
from nasbench.runtime.timing import Budget
from nasbench.store import CEILINGS, KEY, Database, Row, db_path

ROW_BUDGET_S = ByDevice(cpu=0.6, cuda=0.25)
"""Seconds of timing for a row. A CPU is noisier, and a GPU's rows are more."""
ROUNDS = ByDevice(cpu=3, cuda=1)
"""Times that every row is measured, in rounds over the whole sweep, each with its part of the row's budget; the fastest
is kept. The speed of a shared CPU drifts by a fifth over tens of seconds, and what else runs can only add time."""
NOISY = ByDevice(cpu=0.3, cuda=SPREAD)
"""Rows whose p80 - p20 exceeds this share of p50, and those measured while the device was throttled or shared, are
measured once more at the end."""
RETRIES = 0.1
"""At most this share of the rows is, each with RETRY_SCALE times its budget on a GPU."""
RETRY_SCALE = 4
KEEP_S = 2.0
"""Rows are merged into the database this often: what a kill -9 can lose."""
TIMEOUT_S = 180.0
"""Seconds that a row may take besides its timing, compilation of kernels included, before its process counts as
hung."""
SETTLED = ByDevice(cpu=1.0, cuda=0.4)
"""Share of its budget that a row takes: a GPU's percentiles are close together long before its end."""
GUESSED_TFLOP_S = ByDevice(cpu=0.1, cuda=100.0)
"""Matrix-product rate of a device without a data sheet, before it is measured, 10^12 operations per second."""
REACHED = 0.45
"""Share of the rate that a chunk of a prompt reaches."""
FEWEST_RUNS = 9
"""Runs of a workload that even the slowest row takes: warm-up, three that count, the watch, and the launches."""

Progress = Callable[[int, int, Row], None]
"""Called after every row with (rows done, rows in all, the row)."""


@dataclass
class SweepResult:
    """What a sweep did.

    Attributes:
        path: the database file.
        rows: measured now, ceilings included.
        skipped: points that the database had already.
        left: points that the limit left for the next sweep.
        noisy: points whose rows are.
    """

    path: Path
    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    left: list[Point] = field(default_factory=list)
    noisy: list[Point] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Rows of this sweep with a status."""
        return sum(row.status == status for row in self.rows)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before it runs: everything that --dry-run prints."""

    path: Path
    machine: Machine
    bench: Bench
    groups: list[list[Point]]
    skipped: int
    ceilings: bool
    rounds: int = 1
    isolate: bool = True
    timeout_s: float = TIMEOUT_S
    limit_s: float | None = None
    others: tuple[Machine, ...] = ()
    """Cards like `machine`, which measure beside it."""

    @property
    def points(self) -> list[Point]:
        return [point for group in self.groups for point in group]

    @property
    def seconds(self) -> float:
        """Rough time: what every row takes, and what stands around them."""
        kind, budget_s = self.machine.info.kind, self.machine.budget.seconds
        total = self.rounds * sum(map(self.group_seconds, self.groups))
        total += 0.0 if kind == "cpu" else RETRIES / 2 * len(self.points) * RETRY_SCALE * budget_s
        total /= 1 + len(self.others)
        return total + self.ceilings * (4 * (budget_s + ROW_S) + self.isolate * START_S.of(kind))

    def parts(self) -> list[SweepPlan]:
        """A plan for each card: the points in their order, cut where a card has its share of the time."""
        start_s = self.isolate * START_S.of(self.machine.info.kind)
        share_s = (sum(map(self.group_seconds, self.groups)) + start_s * len(self.others)) / (1 + len(self.others))
        shares: list[list[list[Point]]] = [[]]
        used_s = 0.0
        for group in self.groups:
            shares[-1].append([])
            used_s += start_s
            for point in group:
                row_s = self.group_seconds([point]) - start_s
                if used_s + row_s / 2 > share_s and len(shares) <= len(self.others):
                    shares.append([[]])
                    used_s = start_s
                shares[-1][-1].append(point)
                used_s += row_s
        found = []
        for machine, share in zip((self.machine, *self.others), shares, strict=False):
            groups, ceilings = [piece for piece in share if piece], self.ceilings and machine is self.machine
            bench = replace(self.bench, device=machine.device, pool={})
            found.append(replace(self, machine=machine, bench=bench, others=(), groups=groups, ceilings=ceilings))
        return found

    def group_seconds(self, points: Sequence[Point]) -> float:
        """Rough time of points that one child measures once."""
        kind = self.machine.info.kind
        wanted_s = SETTLED.of(kind) * self.machine.budget.seconds
        return sum(self.row_seconds(point, wanted_s) for point in points) + self.isolate * START_S.of(kind)

    def row_seconds(self, point: Point, wanted_s: float) -> float:
        """Rough time of a row whose timing may take so long, or as long as its fewest runs take."""
        info = self.machine.info
        known = DEVICES[info.slug].tflop_s if info.slug in DEVICES else GUESSED_TFLOP_S.of(info.kind)
        rate = self.machine.matmul_tflop_s.get(dtype_name(self.bench.dtype)) or known
        flops = amounts(self.bench.shape, point, self.bench.dtype.itemsize)[1]
        return max(wanted_s, FEWEST_RUNS * most_instances(point) * flops / (REACHED * rate) / 1e12) + ROW_S


def prepare(
    shape: ModelSpec,
    blocks: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int | str],
    modes: Sequence[str] = ("decode", "prefill"),
    *,
    device: str = "cpu",
    db: Path | None = None,
    dtype: str = "fp32",
    chunk: int | None = None,
    force: bool = False,
    seconds_per_row: float | None = None,
    isolate: bool = True,
    timeout_s: float | None = None,
    limit_s: float | None = None,
) -> SweepPlan:
    """Plans a sweep and takes away what the database has: rows measured as ok, oom or unsupported.

    Args:
        blocks: names of mixers, as in placements.
        batches: numbers, or "max" for the largest that fits at each context.
        device: torch device; several with commas, as cuda:0,cuda:1, measure at the same time, each a part.
        db: folder of the database; None for the default one.
        chunk: tokens of a prefill chunk; None for the device's.
        force: measure again what is there.
        seconds_per_row: cap on the timing of one row, all rounds together.
        isolate: measure every group in a child process of its own; a script that asks for that needs the guard
            `if __name__ == "__main__"`.
        timeout_s: a row that takes longer than this is given up.
        limit_s: about how long the sweep may take. Rows get less time where that is not enough for all, every group
            its part of it, and what does not fit is left: further rounds and retries first, then the rows that take
            longest. On a busy machine rows take longer than planned, and more is left.

    Raises:
        UserError: unknown kind, mode or dtype, a context beyond the model's, unequal cards. MachineError: no device.
    """
    devices = [name.strip() for name in device.split(",")]
    info, kind = detect_equal(devices), torch_dtype(dtype)
    if len(devices) > 1 and not isolate:
        raise UserError(f"{len(devices)} devices take a process each: leave out --in-process")
    rounds = ROUNDS.of(info.kind)
    budget = Budget((seconds_per_row or ROW_BUDGET_S.of(info.kind)) / rounds)
    machine, *others = [Machine(info, name, Telemetry(name), budget) for name in devices]
    # On a Jetson the programs on the CPU have a part of the GPU's memory.
    free = Jetson().available_bytes() if info.unified_memory else None
    usable = int(USABLE_MEMORY * min(info.memory_bytes, free or info.memory_bytes))
    bench = Bench(shape, devices[0], kind, info.llc_bytes or 32 << 20, usable)
    chunk = chunk or PREFILL_CHUNK.of(info.kind)
    groups = plan(shape, blocks, contexts, batches, modes, chunk, info.memory_bytes, kind.itemsize)
    path = db_path(info.slug, db)
    rows = Database(path).read()
    known = known_ceilings(rows, dtype)
    use_ceilings(machine, known)
    done = {row.key for row in rows if row.source == "measured" and row.status != "failed" and not force}

    def key(point: Point) -> tuple[object, ...]:
        cells = point_cells(bench, machine.info, point)
        return tuple(cells[name] for name in KEY)

    left = [[point for point in group if key(point) not in done] for group in groups]
    skipped = sum(map(len, groups)) - sum(map(len, left))
    left = [group for group in left if group]
    ceilings = bool(left) and (force or len(known) < len(CEILINGS))
    timeout_s = timeout_s or TIMEOUT_S + 20 * budget.seconds
    todo = SweepPlan(
        path, machine, bench, left, skipped, ceilings, rounds, isolate, timeout_s, limit_s, tuple(others)
    )  # fmt: skip
    if problem := unequal_clocks([each.telemetry for each in (machine, *others)]):
        raise UserError(f"{problem}: rows of unequal cards do not mix")
    if limit_s and todo.seconds > limit_s:
        todo = replace(todo, rounds=max(1, int(rounds * limit_s / todo.seconds)))
    return todo


def run(todo: SweepPlan, progress: Progress | None = None) -> SweepResult:
    """Measures what is left, ceilings first. Rows are merged every KEEP_S seconds, after each group, and when the sweep
    is stopped: a kill loses no more than that.

    Raises MachineError when the database cannot be written.
    """
    remove_leftovers(todo.path.parent)
    sweeps: list[_Sweep] = []
    lock, stop = threading.Lock(), threading.Event()

    def report(row: Row) -> None:
        with lock:
            if progress:
                progress(sum(sweep.done for sweep in sweeps), sum(sweep.total for sweep in sweeps), row)

    sweeps += [_Sweep(part, report, stop) for part in todo.parts()]
    try:
        ceilings = sweeps[0].ceilings()
        for sweep in sweeps:
            use_ceilings(sweep.todo.machine, ceilings)
        if len(sweeps) == 1:
            results = [sweeps[0].run()]
        else:
            with ThreadPoolExecutor(len(sweeps)) as threads:
                running = [threads.submit(sweep.run) for sweep in sweeps]
                try:
                    wait(running, return_when=FIRST_EXCEPTION)
                finally:
                    # After an error, or Ctrl-C, the others end with the row in hand.
                    if not all(future.done() for future in running):
                        stop.set()
                results = [future.result() for future in running]
    finally:
        for sweep in sweeps:
            sweep.measurer.close()
    return SweepResult(
        todo.path, [*ceilings, *(row for result in results for row in result.rows)], todo.skipped,
        [point for result in results for point in result.left], [point for result in results for point in result.noisy],
    )  # fmt: skip


class _Sweep:
    """A running sweep of one card. `best` has the fastest row of every point so far."""

    def __init__(self, todo: SweepPlan, told: Callable[[Row], None], stop: threading.Event) -> None:
        machine, bench = todo.machine, todo.bench
        self.measurer = Worker(machine, bench, todo.timeout_s) if todo.isolate else InProcess(machine, bench)
        self.todo, self.told, self.stop = todo, told, stop
        self.database = Database(todo.path)
        self.time = TimeBudget(todo.limit_s)
        self.best: dict[Point, Row] = {}
        self.done, self.total = 0, todo.rounds * len(todo.points) + len(CEILINGS) * todo.ceilings

    def ceilings(self) -> list[Row]:
        """The device's own limits, where the plan has them."""
        rows = self.measurer.ceilings() if self.todo.ceilings else []
        if rows:
            self.measurer.new_group()
            for row in rows:
                self.report(row)
            self.database.merge(rows)
        return rows

    def run(self) -> SweepResult:
        todo, budget = self.todo, self.todo.machine.budget
        result = SweepResult(todo.path)
        for turn in range(todo.rounds):
            for index, group in enumerate(todo.groups):
                # What does not fit or does not run will not do so the next time either.
                again = [point for point in group if point in self.best and self.best[point].p50_us is not None]
                waiting = [*todo.groups[index:], *(todo.rounds - 1 - turn) * todo.groups]
                if turn == 0 and _decodes(group):
                    # Without its decode rows a kind has no speed: prompts and further rounds take what those leave.
                    waiting = [other for other in todo.groups[index:] if _decodes(other)]
                self.time.new_group(todo.group_seconds(group) / sum(map(todo.group_seconds, waiting)))
                self.measure(again if turn else group, budget)
                self.done += len(group) - len(again) if turn else 0
        self.time.new_group(1.0)
        for group in todo.groups:
            # Rows that were too slow for their group's part, where others took less than theirs.
            self.measure([point for point in group if point not in self.best], budget)
        result.left = [point for point in todo.points if point not in self.best]
        self.retry(budget)
        result.rows += self.best.values()
        result.noisy = [point for point, row in self.best.items() if row.noisy]
        return result

    def retry(self, budget: Budget) -> None:
        """Measures the noisiest rows once more, at most a share of all."""
        kind = self.todo.machine.info.kind
        noisy = sorted((point for point in self.best if noise(self.best[point]) > NOISY.of(kind)), key=self._calm)
        again = noisy[: ceil(RETRIES * len(self.best))]
        self.total = self.done + len(again)
        if kind == "cuda":
            budget = replace(budget, seconds=RETRY_SCALE * budget.seconds, most=RETRY_SCALE * budget.most)
        for block in dict.fromkeys(point.block for point in again):
            self.measure([point for point in again if point.block == block], budget)

    def _calm(self, point: Point) -> float:
        return -noise(self.best[point])

    def measure(self, points: Iterable[Point], budget: Budget) -> None:
        """Measures points of one group, as far as the time goes."""
        faster: list[Row] = []
        kept = time.monotonic()
        try:
            for point in points:
                if self.stop.is_set():
                    break
                some = self.time.of_row(budget, max(1, self.total - self.done))
                if some is None:
                    break
                planned_s = self.todo.row_seconds(point, some.seconds)
                if not self.time.allows(planned_s):
                    continue
                began = time.monotonic()
                row = self.measurer.measure(point, some)
                self.time.planned_s += planned_s
                self.time.taken_s += time.monotonic() - began
                self.measurer.start_ahead()
                if point not in self.best or _faster(row, self.best[point]):
                    self.best[point] = row
                    faster.append(row)
                self.report(row)
                if time.monotonic() - kept > KEEP_S:
                    self.database.merge(faster)
                    faster, kept = [], time.monotonic()
        finally:
            # Ctrl-C in the middle of a group keeps what the group has.
            self.database.merge(faster)
            self.measurer.new_group()

    def report(self, row: Row) -> None:
        self.done += 1
        self.told(row)


def _decodes(group: Sequence[Point]) -> bool:
    return any(point.mode == "decode" for point in group)


def _faster(new: Row, old: Row) -> bool:
    return new.p50_us is not None and (old.p50_us is None or new.p50_us < old.p50_us)


def noise(row: Row) -> float:
    """Spread of a row over its median; 1 is added where the device was throttled or shared. 0 without a time, and where
    the work is part of another block's."""
    if row.p20_us is None or row.p80_us is None or not row.p50_us:
        return 0.0
    return (row.p80_us - row.p20_us) / row.p50_us + (1.0 if row.throttled else 0.0)
