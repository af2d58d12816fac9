"""Predicted against measured: the placements that a search found, run end to end on their device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nasbench.core.by_device import ByDevice
from nasbench.core.dtypes import torch_dtype
from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import locked, sweep
from nasbench.core.tables import read_table, write_table
from nasbench.cost import CostModel
from nasbench.cost.holdout import WholePoint, compare_point
from nasbench.model.shapes import ModelSpec
from nasbench.runs import Run
from nasbench.search.session import compare
from nasbench.search.trials import Target, latest, read_front, read_trials
from nasbench.spaces.placement import Placement, format_placement, parse_placement

MOST = 16
"""Placements that are measured if not told otherwise."""
SECONDS = 2.0
"""Decoding time of one placement, caches filled, all rounds together."""
START_S = 3.0
"""About what a placement takes besides: weights, caches, the measured context. For --dry-run."""
ROUNDS = ByDevice(cpu=3, cuda=1)
"""Rounds over all placements, the fastest time of each being kept: the speed of a shared CPU drifts, as it does under
the profile, which is measured in the same way (nasbench.profiling.sweep)."""


_MEASURED = (
    "placement", "context", "batch", "dtype", "step_p20_ms", "step_ms", "step_p80_ms", "repeats", "floor_fraction",
    "device", "torch", "driver", "nasbench", "measured_utc",
)  # fmt: skip
"""Columns that are fields of nasbench.runtime.throughput.ThroughputResult."""


@dataclass(frozen=True, kw_only=True)
class ValidationRow:
    """One placement on one target: a row of runs/NAME/validation.csv. Older files lack the columns with a default.

    Attributes:
        predicted_tok_s, measured_tok_s: decode, all sequences together; the cost model's (NaN where it has no rows) and
            the median of the repeats.
        error: predicted / measured - 1.
        floor_fraction: least time of the step (nasbench.runtime.roofline) over the time it took.
        source: of the prediction: measured or estimated rows.
    """

    placement: str
    context: int
    batch: int
    dtype: str = ""
    predicted_tok_s: float
    measured_tok_s: float
    error: float
    step_p20_ms: float = math.nan
    step_ms: float = math.nan
    step_p80_ms: float = math.nan
    repeats: int = 0
    floor_fraction: float = math.nan
    device: str
    source: str = "measured"
    torch: str = ""
    driver: str = ""
    nasbench: str = ""
    measured_utc: str

    @property
    def target(self) -> Target:
        return Target(self.device, self.context, self.batch, self.dtype)

    @property
    def layers(self) -> Placement:
        return parse_placement(self.placement)


def choose(run: Run, target: Target, most: int = MOST) -> list[Placement]:
    """Full attention; of every K that was searched for the front's placement, which a report may recommend, and the
    best by the search's objective; the front of the target thinned evenly, and uniform placements; `most` in all.

    Raises UserError where no search has looked at this target.
    """
    trials = latest(read_trials(run.trials), target)
    rows = [row for row in read_front(run.front) if row.target == target]
    front = [row.layers for row in rows]
    if not trials or not front:
        known = sorted({str(trial.target) for trial in read_trials(run.trials)})
        raise UserError(
            f"no search of {run.path} for {target} (searched are: {'; '.join(known) or 'none'}): "
            f"run `nasbench search {run.path} --context {target.context} --batch {target.batch}`"
        )
    baselines = [trial.layers for trial in trials if trial.strategy in ("teacher", "uniform")]
    share = max(1, most - min(len(baselines), most // 3))
    pairs = compare(trials, sorted({trial.k for trial in trials}))
    at = {row.k: row.layers for row in reversed(rows)}
    named = [*(at[pair.k] for pair in pairs if pair.k in at), *(pair.searched.layers for pair in pairs)]
    spread = [front[round(i * (len(front) - 1) / (share - 1 or 1))] for i in range(share)]
    thinned = list(dict.fromkeys([*named, *spread]))[: share - 1]
    return list(dict.fromkeys([run.spec.space.original, *thinned, *baselines, *front]))[:most]


def validate(
    run: Run,
    placements: Sequence[Placement],
    target: Target,
    cost: CostModel | None,
    shape: ModelSpec,
    torch_device: str,
    *,
    seconds: float = SECONDS,
    limit_s: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = print,
) -> list[ValidationRow]:
    """Measures the placements that validation.csv does not hold yet; returns the rows of all of them.

    Speed does not depend on the weights: they are random. Each row is written when it is measured.

    Args:
        cost: None for a context that has no predictions: one beyond the model's own, whose cache is then longer than
            any that the model was trained for.
        seconds: of decoding for one placement. limit_s: of all; what is left over, the next call measures.
        log: told which placements do not fit in memory.
    """
    from nasbench.cost.end_to_end import Decoders
    from nasbench.runtime.memory import free_bytes
    from nasbench.runtime.roofline import measure_ceilings
    from nasbench.runtime.throughput import measure

    sweep(run.path)
    dtype = torch_dtype(target.dtype)
    rounds = ROUNDS.of(torch_device)
    path = run.validation
    left = missing(run, placements, target, cost)
    total, done = len(placements) * rounds, (len(placements) - len(left)) * rounds
    progress(done, total)
    shape = replace(shape, max_context=max(shape.max_context, target.context))
    decoders = Decoders(shape, torch_device, dtype) if left else None
    ceilings = measure_ceilings(torch_device, free_bytes(torch_device), dtype) if left else None
    best: dict[Placement, float] = {}
    ends = time.monotonic() + limit_s
    for placement in left * rounds:
        assert decoders is not None
        if time.monotonic() > ends:
            log(f"time is up: {len(best)} of {len(left)} placements measured")
            break
        try:
            result = measure(
                shape,
                placement,
                context=target.context,
                batch=target.batch,
                decoder=decoders.of(placement),
                prefill_context=None,
                seconds=seconds / rounds,
                ceilings=ceilings,
            )
        except MachineError as error:
            log(f"left out {format_placement(placement)}: {error}")
            continue
        if result.decode_tok_s > best.get(placement, 0.0):
            best[placement] = result.decode_tok_s
            point = WholePoint("decode", placement, target.context, target.batch)
            seen = compare_point(cost, point, result.decode_tok_s) if cost is not None else None
            row = ValidationRow(
                predicted_tok_s=seen.predicted_tok_s if seen else math.nan,
                measured_tok_s=result.decode_tok_s,
                error=seen.error if seen else math.nan,
                source=seen.source if seen else "",
                **{name: getattr(result, name) for name in _MEASURED},
            )
            _add(path, row)
        done += 1
        progress(done, total)
    names = {format_placement(placement) for placement in placements}
    return [row for row in read_validation(path) if row.target == target and row.placement in names]


def missing(run: Run, placements: Sequence[Placement], target: Target, cost: CostModel | None) -> list[Placement]:
    """The placements that validation.csv does not hold yet. Raises UserError where the profile does not cover one."""
    known = {row.placement for row in read_validation(run.validation) if row.target == target}
    left = [placement for placement in placements if format_placement(placement) not in known]
    if cost is not None:
        for placement in left:
            cost.decode(placement, target.context, target.batch)
    return left


def read_validation(path: Path) -> list[ValidationRow]:
    """The rows of a validation.csv, older ones too; none where there is no file."""
    return read_table(path, ValidationRow, exact=False)


def _add(path: Path, row: ValidationRow) -> None:
    with locked(path):
        others = [old for old in read_validation(path) if (old.placement, old.target) != (row.placement, row.target)]
        write_table(path, [*others, row])


def mean_error(rows: Sequence[ValidationRow]) -> float:
    """Mean absolute relative error of the predictions; NaN where there are none."""
    errors = [abs(row.error) for row in rows if not math.isnan(row.error)]
    return sum(errors) / len(errors) if errors else math.nan
