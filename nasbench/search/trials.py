"""runs/NAME/trials.csv, the memory of every search, and front.csv, what is best of it for each target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors
from nasbench.search.pareto import front as pareto_front
from nasbench.search.pareto import hypervolume
from nasbench.search.table import read_rows, write_rows
from nasbench.spaces.placement import Placement, count_kind, parse_placement

SENSES = (False, True)
"""Of (loss, tokens/s): the first is minimised, the second maximised."""
UNIFORM = "uniform"
"""The strategy name of the baseline's trials."""
FILLERS = "fillers"
"""The strategy name of the trials without full attention, of which the best gives all others their fillers."""
TEACHER = "teacher"
"""The strategy name of the unchanged model's trial."""


@dataclass(frozen=True)
class Target:
    """What a search optimises the speed for."""

    device: str
    context: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.device}, context {self.context}, batch {self.batch}, {self.dtype}"


@dataclass(frozen=True)
class Trial:
    """One placement that a strategy tried, for one target: a row of trials.csv.

    Attributes:
        trial: running number in the file.
        k: layers with full attention.
        loss: mean loss of a token on the search split, nats; `loss_stderr` its standard error.
        kl: KL divergence from the teacher, nats a token; NaN where not measured.
        source: of the speeds: measured or estimated rows.
        seconds: that the loss took; 0 where another trial had measured the placement already.
        supernet: version of the weights.
    """

    trial: int
    strategy: str
    k: int
    placement: str
    loss: float
    loss_stderr: float
    kl: float
    decode_tok_s: float
    prefill_tok_s: float
    cache_bytes: int
    step_ms: float
    device: str
    context: int
    batch: int
    dtype: str
    source: str
    seconds: float
    created_utc: str
    supernet: str

    @property
    def target(self) -> Target:
        return Target(self.device, self.context, self.batch, self.dtype)

    @property
    def layers(self) -> Placement:
        return parse_placement(self.placement)

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a trial a repeat of another."""
        return self.strategy, self.placement, self.target, self.supernet


@dataclass(frozen=True)
class FrontRow:
    """One point of a target's Pareto front of loss against decode tokens/s: a row of front.csv.

    Attributes:
        rank: 1 is the most accurate point.
        hypervolume: of the whole front, nats x tokens/s, bounded by `reference_loss` and `reference_tok_s`.
        loss_test, loss_test_stderr: on the split that no search looks at; NaN where not evaluated.
        retrieval: accuracy on the generated key-value task; NaN where not evaluated.
    """

    rank: int
    strategy: str
    k: int
    placement: str
    loss: float
    loss_stderr: float
    kl: float
    loss_test: float
    loss_test_stderr: float
    retrieval: float
    decode_tok_s: float
    prefill_tok_s: float
    step_ms: float
    cache_bytes: int
    device: str
    context: int
    batch: int
    dtype: str
    source: str
    supernet: str
    hypervolume: float
    reference_loss: float
    reference_tok_s: float

    @property
    def target(self) -> Target:
        return Target(self.device, self.context, self.batch, self.dtype)

    @property
    def layers(self) -> Placement:
        return parse_placement(self.placement)


def _locked(path: Path) -> FileLock:
    with machine_errors(f"locking {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        lock.acquire()
    return lock


def read_trials(path: Path) -> list[Trial]:
    """All trials of a run, none if there is no file yet. Raises UserError with file, line and column of a bad cell."""
    trials = read_rows(path, Trial)
    for line, trial in enumerate(trials, 2):
        try:
            parse_placement(trial.placement)
        except UserError as error:
            raise UserError(f"{path}:{line}:placement: {error}") from None
    return trials


def add_trials(path: Path, fresh: Iterable[Trial]) -> list[Trial]:
    """Adds trials that the file does not hold, numbers them, and returns all. Writers in other processes wait."""
    lock = _locked(path)
    try:
        trials = read_trials(path)
        known = {trial.key for trial in trials}
        size = len(trials)
        for trial in fresh:
            if trial.key not in known:
                known.add(trial.key)
                trials.append(Trial(**{**trial.__dict__, "trial": len(trials) + 1}))
        if len(trials) > size:
            write_rows(path, Trial, trials)
        return trials
    finally:
        lock.release()


def score(loss: float, kl: float) -> float:
    """The divergence from the teacher where it is known, else the loss.

    On the same few thousand tokens it tells placements apart with far less noise: how hard the text itself is cancels.
    In a search of the quickstart its rank correlation with the loss on other text was 0.98, that of the loss 0.72.
    """
    return loss if math.isnan(kl) else kl


def best_of(trials: Iterable[Trial]) -> Trial:
    """The lowest score; equal ones are told apart by speed, then by the text of the placement."""
    return min(trials, key=lambda trial: (score(trial.loss, trial.kl), -trial.decode_tok_s, trial.placement))


def latest(trials: Iterable[Trial], target: Target, supernet: str | None = None) -> list[Trial]:
    """The trials of a target, of one version of the weights: the given one, or that of the last trial."""
    mine = [trial for trial in trials if trial.target == target]
    version = supernet if supernet is not None else (mine[-1].supernet if mine else "")
    return [trial for trial in mine if trial.supernet == version]


def unique(trials: Iterable[Trial]) -> list[Trial]:
    """One trial per placement: the first that tried it, but never the baseline's where a search found it as well."""
    chosen: dict[str, Trial] = {}
    for trial in trials:
        if trial.placement not in chosen or chosen[trial.placement].strategy == UNIFORM != trial.strategy:
            chosen[trial.placement] = trial
    return list(chosen.values())


TestScores = Callable[[Placement], tuple[float, float, float]]
"""(loss on the test split, its standard error, retrieval accuracy) of a placement, NaN where not evaluated."""


def front_rows(trials: Sequence[Trial], reference_loss: float, scores: TestScores | None = None) -> list[FrontRow]:
    """The Pareto front of one target's trials, the most accurate first.

    Args:
        trials: of one target and one version of the weights.
        reference_loss: of the hypervolume, nats; the reference speed is 0 tokens/s.
        scores: test scores to put beside each point.
    """
    candidates = sorted(unique(trials), key=lambda trial: (trial.loss, -trial.decode_tok_s, trial.placement))
    points = [(trial.loss, trial.decode_tok_s) for trial in candidates]
    chosen = [trial for trial, best in zip(candidates, pareto_front(points, SENSES), strict=True) if best]
    volume = hypervolume(points, (reference_loss, 0.0), SENSES)
    rows = []
    for rank, trial in enumerate(chosen, 1):
        test, stderr, retrieval = scores(trial.layers) if scores else (math.nan, math.nan, math.nan)
        shared: dict[str, Any] = {
            name: getattr(trial, name) for name in FrontRow.__dataclass_fields__ if hasattr(trial, name)
        }
        rows.append(
            FrontRow(
                rank=rank, loss_test=test, loss_test_stderr=stderr, retrieval=retrieval, hypervolume=volume,
                reference_loss=reference_loss, reference_tok_s=0.0, **shared,
            )
        )  # fmt: skip
    return rows


def read_front(path: Path) -> list[FrontRow]:
    """The fronts of all targets of a run. Raises UserError with file, line and column of a bad cell."""
    return read_rows(path, FrontRow)


def write_front(path: Path, target: Target, rows: Sequence[FrontRow]) -> None:
    """Replaces the front of one target and keeps those of the others."""
    lock = _locked(path)
    try:
        others = [row for row in read_front(path) if row.target != target]
        merged = sorted([*others, *rows], key=lambda row: (row.device, row.context, row.batch, row.dtype, row.rank))
        write_rows(path, FrontRow, merged)
    finally:
        lock.release()


def k_of(placement: Placement) -> int:
    """Layers with full attention."""
    return count_kind(placement, "A")
