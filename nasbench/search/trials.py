"""runs/NAME/trials.csv, the memory of every search, and front.csv, what is best of it for each target.

A trial refers to its scores: losses stand in the run's score store and are joined when trials are read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nasbench.core.errors import UserError
from nasbench.core.files import locked
from nasbench.core.tables import read_table, write_table
from nasbench.evaluation.scores import ScoreKey, Scores, ScoreStore
from nasbench.search.pareto import front as pareto_front
from nasbench.search.pareto import hypervolume
from nasbench.spaces.placement import Placement, parse_placement

log = logging.getLogger("nasbench")
SENSES = (False, True)
"""Of (score, tokens/s): the first is minimised, the second maximised."""
UNIFORM = "uniform"
"""The strategy name of the baseline's trials."""
FILLERS = "fillers"
"""The strategy name of the trials without full attention, of which the best gives all others their replacements."""
TEACHER = "teacher"
"""The strategy name of the unchanged model's trial."""
NEAREST = "nearest"
"""The strategy name of the placement within the limits that keeps the most layers as they are."""
DRAWN = "random-"
"""The strategy names of random baselines: `random-0`, `random-1`, ..."""
OLD_SETTINGS = "trials.csv"
"""The settings of losses that an older version kept in trials.csv: on which text is not known."""


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
class TrialRow:
    """One placement that a strategy tried, for one target: a row of trials.csv. Older files lack what has a default.

    Attributes:
        k: layers with full attention.
        source: of the speeds: measured or estimated rows.
        supernet: version of the weights.
        trial: running number in the file.
        seconds: that the scores took; 0 where they were known.
        objective, score: what the search minimised, and its value.
        limits, excess: what the last search that tried it was limited by, as typed, and by how much of their bounds it
            misses those limits: 0 where it keeps to them, NaN where that is not known.
        settings, eval_dtype: the text that loss and KL were measured on, and in which dtype: with `supernet` and
            `placement` their keys in the score store.
    """

    strategy: str
    k: int
    placement: str
    decode_tok_s: float
    prefill_tok_s: float
    cache_bytes: int
    step_ms: float
    device: str
    context: int
    batch: int
    dtype: str
    source: str
    supernet: str
    trial: int = 0
    seconds: float = 0.0
    created_utc: str = ""
    objective: str = "kl"
    score: float = math.nan
    settings: str = OLD_SETTINGS
    eval_dtype: str = ""
    limits: str = ""
    excess: float = 0.0

    @property
    def target(self) -> Target:
        return Target(self.device, self.context, self.batch, self.dtype)

    @property
    def layers(self) -> Placement:
        return parse_placement(self.placement)

    @property
    def scoring(self) -> tuple[str, ...]:
        """Scores of different ones of these are never compared."""
        return self.supernet, self.objective, self.settings, self.eval_dtype

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a trial a repeat of another."""
        return self.strategy, self.placement, self.target, self.scoring

    def score_key(self, task: str) -> ScoreKey:
        """Of its loss or KL in the score store."""
        return ScoreKey(self.supernet, self.placement, task, self.settings, self.eval_dtype)


@dataclass(frozen=True)
class Trial(TrialRow):
    """A trial with what the score store has of it. Files of older versions kept that themselves.

    Attributes:
        loss: mean loss of a token on the search split, nats; `loss_stderr` its standard error.
        kl: KL divergence from the teacher, nats a token. NaN where not measured.
    """

    loss: float = math.nan
    loss_stderr: float = math.nan
    kl: float = math.nan

    @property
    def front_score(self) -> float:
        """What the front sets against the speed: the loss where the objective is over text, else the score."""
        return self.loss if self.objective in ("loss", "kl") else self.score


@dataclass(frozen=True)
class FrontRow(Trial):
    """One point of a target's Pareto front of accuracy against decode tokens/s: a row of front.csv.

    Attributes:
        rank: 1 is the most accurate point.
        loss_test, loss_test_stderr: on the split that no search looks at; NaN where not evaluated.
        retrieval: accuracy on the generated key-value task; NaN where not evaluated.
        hypervolume: of the whole front, bounded by `reference_loss` and `reference_tok_s`; nats x tokens/s where the
            objective is loss or kl.
    """

    rank: int = 0
    loss_test: float = math.nan
    loss_test_stderr: float = math.nan
    retrieval: float = math.nan
    hypervolume: float = math.nan
    reference_loss: float = math.nan
    reference_tok_s: float = 0.0


def _check(row: TrialRow) -> str:
    try:
        parse_placement(row.placement)
    except UserError as error:
        return f"placement: {error}"
    return ""


def _read_rows(path: Path) -> list[Trial]:
    """The file's rows; those of older versions have their losses."""
    found = []
    for line, row in enumerate(read_table(path, Trial, exact=False, check=_check), 2):
        if not math.isnan(row.score):
            found.append(row)
        elif math.isfinite(row.loss):
            # Searches minimised the KL, or the loss where that was not known.
            kl = math.isfinite(row.kl)
            found.append(replace(row, objective="kl" if kl else "loss", score=row.kl if kl else row.loss))
        else:
            log.warning("%s line %d: left out: the loss of %s is %s", path, line, row.placement, row.loss)
    return found


def read_trials(path: Path, store: ScoreStore | None = None) -> list[Trial]:
    """All trials of a run with their losses, none if there is no file yet. Raises UserError naming file, line and
    column of a bad cell.

    Args:
        store: where the losses are, that of the run by default.
    """
    rows = _read_rows(path)
    store = store or ScoreStore(path.parent / "scores")
    found = []
    for row in rows:
        loss, kl = store.get(row.score_key("loss")), store.get(row.score_key("kl"))
        row = replace(row, loss=loss.value, loss_stderr=loss.stderr) if loss else row
        found.append(replace(row, kl=kl.value) if kl else row)
    return found


def add_trials(path: Path, fresh: Iterable[TrialRow]) -> None:
    """Adds trials, numbered; one that the file holds with another score or other limits takes its place. Writers in
    other processes wait."""
    with locked(path):
        rows: list[TrialRow] = list(_read_rows(path))
        old = [row for row in rows if isinstance(row, Trial) and math.isfinite(row.loss)]
        _move_losses(path, old)
        places = {row.key: place for place, row in enumerate(rows)}
        changed = bool(old)
        for row in fresh:
            place = places.setdefault(row.key, len(rows))
            if place == len(rows) or (rows[place].score, rows[place].limits) != (row.score, row.limits):
                rows[place : place + 1] = [replace(row, trial=place + 1)]
                changed = True
        if changed:
            write_table(path, rows, TrialRow)


def _move_losses(path: Path, trials: Sequence[Trial]) -> None:
    """From a trials.csv of the old version into the score store."""
    scores = {}
    for trial in trials:
        for task, value, stderr in (("loss", trial.loss, trial.loss_stderr), ("kl", trial.kl, math.nan)):
            if math.isfinite(value):
                scores[trial.score_key(task)] = Scores("nats", False, value, stderr, 1, about={"from": path.name})
    ScoreStore(path.parent / "scores").put(scores)


def best_of(trials: Iterable[Trial]) -> Trial:
    """The lowest score, of those with the last trial's objective: scores of different ones do not compare. Equal ones
    are told apart by speed, then by the text of the placement."""
    found = list(trials)
    mine = [trial for trial in found if trial.objective == found[-1].objective]
    return min(mine, key=lambda trial: (trial.score, -trial.decode_tok_s, trial.placement))


def latest(trials: Iterable[Trial], target: Target, scoring: tuple[str, ...] | None = None) -> list[Trial]:
    """The trials of a target that were scored in a given way (`Trial.scoring`), or, of any objective, with the last
    trial's weights, text and dtype."""
    mine = [trial for trial in trials if trial.target == target]
    if scoring is not None:
        return [trial for trial in mine if trial.scoring == scoring]
    ways = [(trial.supernet, trial.settings, trial.eval_dtype) for trial in mine]
    return [trial for trial, way in zip(mine, ways, strict=True) if way == ways[-1]]


def unique(trials: Iterable[Trial]) -> list[Trial]:
    """One trial per placement: the first that tried it, but never the baseline's where a search found it as well."""
    chosen: dict[str, Trial] = {}
    for trial in trials:
        if trial.placement not in chosen or chosen[trial.placement].strategy == UNIFORM != trial.strategy:
            chosen[trial.placement] = trial
    return list(chosen.values())


TestScores = Callable[[Placement], tuple[float, float, float]]
"""(loss on the test split, its standard error, retrieval accuracy) of a placement, NaN where not evaluated."""


def front_rows(trials: Sequence[Trial], reference: float, scores: TestScores | None = None) -> list[FrontRow]:
    """The Pareto front of one target's trials, the most accurate first.

    Args:
        trials: of one target and one way of scoring.
        reference: of the hypervolume; the reference speed is 0 tokens/s.
        scores: test scores to put beside each point.
    """
    candidates = sorted(unique(trials), key=lambda trial: (trial.front_score, -trial.decode_tok_s, trial.placement))
    points = [(trial.front_score, trial.decode_tok_s) for trial in candidates]
    chosen = [trial for trial, best in zip(candidates, pareto_front(points, SENSES), strict=True) if best]
    volume = hypervolume(points, (reference, 0.0), SENSES)
    rows = []
    for rank, trial in enumerate(chosen, 1):
        test, stderr, retrieval = scores(trial.layers) if scores else (math.nan, math.nan, math.nan)
        rows.append(
            FrontRow(
                **vars(trial), rank=rank, loss_test=test, loss_test_stderr=stderr, retrieval=retrieval,
                hypervolume=volume, reference_loss=reference,
            )
        )  # fmt: skip
    return rows


def read_front(path: Path) -> list[FrontRow]:
    """The fronts of all targets of a run. Raises UserError naming file, line and column of a bad cell."""
    return read_table(path, FrontRow, exact=False)


def write_front(path: Path, target: Target, rows: Sequence[FrontRow]) -> None:
    """Replaces the front of one target and keeps those of the others."""
    with locked(path):
        others = [row for row in read_front(path) if row.target != target]
        merged = sorted([*others, *rows], key=lambda row: (row.device, row.context, row.batch, row.dtype, row.rank))
        write_table(path, merged, FrontRow)
