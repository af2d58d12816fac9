"""One search: its options, its budget, and what every strategy works through."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import locked
from nasbench.core.provenance import utc_now
from nasbench.core.registry import Registry
from nasbench.search.limited import check_limits
from nasbench.search.limits import Limit
from nasbench.search.objective import Measured, RunObjective
from nasbench.search.trials import (
    DRAWN,
    FILLERS,
    NEAREST,
    TEACHER,
    UNIFORM,
    Trial,
    TrialRow,
    add_trials,
    best_of,
    latest,
    read_trials,
)
from nasbench.spaces.placement import Placement, format_placement
from nasbench.spaces.space import Space, count_full

BATCH = 32
"""Placements that are evaluated in one call, between two looks at the losses and two writes of the trials."""
FEWEST, USUAL, MOST = 8, 120, 1000
"""Evaluations that a time gives: the fewest for each K, the most in all."""


@dataclass(frozen=True)
class Options:
    """What a strategy is asked.

    Attributes:
        full_attention: the wanted numbers of full-attention layers, ascending; () where the strategy may choose.
        evaluations: placements that one strategy may look at; those in the memory count, so that a search that was
            stopped and started again is the search that was not stopped.
        seconds: time for the strategy, from which `evaluations` follow; 0 to take these as they are.
        random: random placements of every K among the baselines.
        beam_width, candidates: of the beam: sets of layers kept a level, layers tried for each.
        replacement: the name in every layer without full attention; "" for each layer's best of those that are faster
            than full attention on the target, or of all where there are limits.
        limits: on costs and on tasks; every strategy keeps to them.
        storage: URL of Optuna's database, or path of a journal file; "" for a journal file in the run folder.
        worker: one of several processes that share the storage; each draws its own trials.
    """

    full_attention: tuple[int, ...] = ()
    evaluations: int = USUAL
    seconds: float = 0.0
    random: int = 1
    beam_width: int = 4
    candidates: int = 8
    replacement: str = ""
    seed: int = 0
    limits: tuple[Limit, ...] = ()
    storage: str = ""
    worker: bool = False

    def check(self, space: Space) -> None:
        """Raises UserError for a K or a replacement that the space does not have, and for sizes below 1."""
        for count in self.full_attention:
            space.check_full_attention(count)
        if self.replacement and any(
            self.replacement not in space.efficient(layer) for layer in range(space.num_layers)
        ):
            raise unknown("replacement", self.replacement, space.efficient_names)
        for name, unit in (("seconds", "seconds"), ("random", "placements")):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"bad --{name} {getattr(self, name)}: choose {unit} above 0, or 0 for none")
        for name in ("evaluations", "beam_width", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}: choose 1 or more")


Progress = Callable[[str, int, int], None]
"""Called with (what is being done, evaluations done, evaluations allowed)."""


@dataclass
class Session:
    """What a strategy works with. It proposes placements to `evaluate`, and reads the answers."""

    folder: Path
    objective: RunObjective
    options: Options
    progress: Progress = lambda what, done, total: None
    visited: dict[str, set[Placement]] = field(default_factory=dict)
    charged: dict[str, int] = field(default_factory=dict)
    known: dict[Placement, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a strategy says of its answer."""

    def __post_init__(self) -> None:
        self.options.check(self.space)

    @property
    def space(self) -> Space:
        return self.objective.space

    @property
    def path(self) -> Path:
        return self.folder / "trials.csv"

    @cached_property
    def importance(self) -> Mapping[tuple[int, str], float]:
        """The KL that each (layer, replacement) costs alone; a layer's original costs nothing."""
        originals = dict.fromkeys(enumerate(self.space.original), 0.0)
        return {**originals, **self.objective.importance(self.faster)}

    @cached_property
    def faster(self) -> tuple[str, ...]:
        """The replacement asked for, or the names that are faster than the model itself on the target; all, if none is.

        A layer that is slower than the attention it replaces can only lose: on a short context or without a fast
        kernel that is what linear attention does. Where there are limits, it may still keep to them.
        """
        if self.options.replacement:
            return (self.options.replacement,)
        names = self.space.efficient_names
        if self.options.limits:
            return names
        full_ms = self.objective.speed(self.space.original).step_ms
        fast = [name for name in names if self.objective.speed(self.space.homogeneous(name)).step_ms < full_ms]
        return tuple(fast or names)

    def replacements(self, layer: int) -> tuple[str, ...]:
        """The replacements of a layer: those that are faster, and its original where that is no full attention."""
        if self.options.replacement:
            return (self.options.replacement,)
        legal, own = self.space.efficient(layer), self.space.original[layer]
        return tuple(name for name in legal if name in self.faster or name == own) or legal

    @cached_property
    def base(self) -> Placement:
        """The replacement of every layer: the one asked for, else the one that costs the layer the least, or the same
        in all layers where that scores better: what layers cost alone does not add up."""
        if self.options.replacement:
            return (self.options.replacement,) * self.space.num_layers
        mixed = tuple(
            min(self.replacements(layer), key=lambda name: self.importance.get((layer, name), math.inf))
            for layer in range(self.space.num_layers)
        )
        scores = self.evaluate(dict.fromkeys([mixed, *self.homogeneous]), FILLERS, free=True)
        return min(scores, key=lambda placement: (scores[placement], placement != mixed, placement))

    @property
    def homogeneous(self) -> list[Placement]:
        """No full attention, one replacement in all layers."""
        return self.space.without_full(self.faster)

    def with_full(self, layers: Iterable[int]) -> Placement:
        """Full attention at `layers`, the base elsewhere."""
        return self.space.with_full_attention(self.base, frozenset(layers))

    @cached_property
    def layer_importance(self) -> tuple[float, ...]:
        """What full attention in a layer saves, measured alone."""
        return tuple(self.importance.get((layer, name), 0.0) for layer, name in enumerate(self.base))

    @property
    def fills(self) -> list[Placement]:
        """What baselines have where they have no full attention: the base, where a K or limits ask for the layers'
        importance, and every replacement alone."""
        asked = self.options.full_attention or self.options.limits
        return list(dict.fromkeys([*([self.base] if asked else []), *self.homogeneous]))

    @cached_property
    def most(self) -> int:
        """The largest wanted K; where limits decide, the largest that keeps to those on costs if spread evenly."""
        counts = range(len(self.space.may_be_full), 0, -1)
        evenly = (k for k in counts if self.keeps(self.with_full(self.space.evenly(k))))
        return max(self.options.full_attention) if self.options.full_attention else next(evenly, 0)

    def evenly_spread(self, count: int) -> list[Placement]:
        """Evenly spread placements of K full layers, with every fill."""
        even = self.space.evenly(count)
        return list(dict.fromkeys(self.space.with_full_attention(fill, even) for fill in self.fills))

    @cached_property
    def cost_limits(self) -> list[Limit]:
        """The limits that are known before anything is evaluated."""
        return [limit for limit in self.options.limits if limit.workload is not None]

    def values(self, placement: Placement) -> list[tuple[Limit, float]]:
        """What a placement costs where there are limits."""
        return [(limit, self._cost(limit, placement)) for limit in self.cost_limits]

    def _cost(self, limit: Limit, placement: Placement) -> float:
        costs, at = self.objective.costs, limit.workload
        assert costs is not None
        assert at is not None
        return costs.value(limit.metric, at, placement)

    def excess(self, placement: Placement) -> float:
        """By how much of their bounds a placement misses the limits, summed; limits on tasks count once measured."""
        measured = self.known[placement].excess if placement in self.known else 0.0
        return measured + sum(limit.excess(value) for limit, value in self.values(placement))

    def kept(self, placement: Placement) -> dict[str, Any]:
        """The limits and what a placement misses, as a trial has them."""
        tasks = len(self.cost_limits) < len(self.options.limits)
        excess = self.excess(placement) if placement in self.known or not tasks else math.nan
        return {
            "limits": " ".join(map(str, self.options.limits)), "excess": excess if math.isfinite(excess) else math.nan
        }  # fmt: skip

    def keeps(self, placement: Placement) -> bool:
        """Whether a placement keeps to all limits, as far as is known."""
        return self.excess(placement) == 0

    def feasible(self) -> list[Trial]:
        """The trials of this target that keep to all limits."""
        return [trial for trial in self.trials() if self.kept(trial.layers)["excess"] == 0]

    def remaining(self, strategy: str) -> int:
        """Placements that the strategy may still look at."""
        spent = len(self.visited.get(strategy, ())) + self.charged.get(strategy, 0)
        return self.options.evaluations - spent

    def charge(self, strategy: str, evaluations: int) -> None:
        """Takes from the budget what a strategy's own work costs, in evaluations that take as long."""
        self.charged[strategy] = self.charged.get(strategy, 0) + evaluations

    def evaluate(
        self, placements: Iterable[Placement], strategy: str, free: bool = False, stepping: bool = False, keep: int = 0
    ) -> dict[Placement, float]:
        """Scores of the placements, as far as the strategy's budget goes; trials are written as they come.

        Placements that miss a limit on a cost get no score. One that turns out to miss a limit on a task gets the
        objective's reference and what it misses by: a score worse than of all that keep to it.

        Args:
            free: charge no budget (baselines).
            stepping: score also what misses a limit on a cost, in the same way: a step on the way to what keeps to it.
            keep: only the best so many matter. The others may be stopped early (nasbench.search.racing): they leave no
                trial, and their score is that of the last that matters and the gap to it.
        """
        visited = self.visited.setdefault(strategy, set())
        allowed: list[Placement] = []
        for placement in dict.fromkeys(placements):
            if not (free or stepping or self.keeps(placement)):
                continue
            if placement not in visited:
                if not free and self.remaining(strategy) < 1:
                    continue
                visited.add(placement)
            allowed.append(placement)
        fresh = [placement for placement in allowed if placement not in self.known]
        stopped = self.objective.race(fresh, keep) if 0 < keep < len(fresh) and not self.options.limits else {}
        allowed = [placement for placement in allowed if placement not in stopped]
        answers: dict[Placement, float] = {}
        for start in range(0, len(allowed), BATCH):
            answers.update(self._evaluate_batch(allowed[start : start + BATCH], strategy))
            self.progress(strategy, len(visited), len(visited) if free else self.options.evaluations)
        return answers | {placement: answers[rival] + gap for placement, (rival, gap) in stopped.items()}

    def _evaluate_batch(self, placements: Sequence[Placement], strategy: str) -> dict[Placement, float]:
        fresh = [self.space.check(placement) for placement in placements if placement not in self.known]
        seconds = 0.0
        if fresh:
            began = time.perf_counter()
            self.known.update(zip(fresh, self.objective.measure(fresh), strict=True))
            seconds = (time.perf_counter() - began) / len(fresh)
        rows = [self._trial(placement, strategy, seconds if placement in fresh else 0.0) for placement in placements]
        add_trials(self.path, rows)
        return {placement: self._penalised(placement) for placement in placements}

    def _penalised(self, placement: Placement) -> float:
        excess = self.excess(placement)
        return self.objective.reference + excess if excess else self.known[placement].score

    def _trial(self, placement: Placement, strategy: str, seconds: float) -> TrialRow:
        objective, target = self.objective, self.objective.target
        return TrialRow(
            strategy=strategy,
            k=count_full(placement),
            placement=format_placement(placement),
            objective=objective.text,
            score=self.known[placement].score,
            **vars(objective.speed(placement)),
            **vars(target),
            seconds=round(seconds, 3),
            created_utc=utc_now(),
            supernet=objective.version,
            settings=objective.settings,
            eval_dtype=objective.dtype,
            **self.kept(placement),
        )

    def trials(self) -> list[Trial]:
        """All trials of this target that were scored in this way, of every strategy and every earlier search."""
        ours = self.objective.version, self.objective.text, self.objective.settings, self.objective.dtype
        return latest(read_trials(self.path, self.objective.store), self.objective.target, ours)


Strategy = Callable[[Session], None]
"""Proposes placements to `search.evaluate` until its budget is spent or it has nothing left to try. One that cannot
choose K itself has the attribute `needs_count`."""

STRATEGIES: Registry[Strategy] = Registry("search strategy", group="nasbench.strategies")


@dataclass(frozen=True)
class Comparison:
    """The best placement of K full-attention layers against the best evenly spread one."""

    k: int
    searched: Trial
    uniform: Trial


def baselines(search: Session) -> None:
    """Trials of every search, at no charge: the model itself, one replacement in all layers, and evenly spread and
    random placements of every wanted K; without one, of the largest within the limits, or of a quarter of the layers.
    """
    space, options, free = search.space, search.options, search.space.may_be_full
    search.evaluate([space.original], TEACHER, free=True)
    search.evaluate(search.fills, FILLERS, free=True)
    for count in options.full_attention or ((search.most if options.limits else len(free) // 4),):
        search.evaluate(search.evenly_spread(count), UNIFORM, free=True)
        for number in range(options.random if 0 < count < len(free) else 0):
            drawn = frozenset(random.Random(f"{options.seed}/{number}/{count}").sample(free, count))
            search.evaluate([space.with_full_attention(search.fills[0], drawn)], f"{DRAWN}{number}", free=True)


def affordable(search: Session) -> int:
    """Evaluations for `Options.seconds`, by the time that the baselines took when they were measured. They stand in
    trials.csv: a search that goes on gets the same number."""
    known = [t.seconds for t in search.trials() if t.seconds > 0 and t.strategy.startswith((FILLERS, UNIFORM, DRAWN))]
    if not known:
        return min(USUAL, search.options.evaluations)
    least = FEWEST * max(1, len(search.options.full_attention))
    return min(search.options.evaluations, max(least, int(search.options.seconds / statistics.median(known))))


def run_search(search: Session, strategy: str) -> list[Comparison]:
    """Runs one strategy after the baselines. Returns, for every wanted K, the best trial so far beside the uniform one.

    Raises:
        UserError: unknown strategy, or options that the space or the strategy does not take.
    """
    propose = STRATEGIES[strategy]
    if getattr(propose, "needs_count", False) and not search.options.full_attention and not search.options.limits:
        raise UserError(
            f"{strategy} needs the number of full-attention layers, --full-attention K[,K...], or limits, "
            "as --max cache=64MiB"
        )
    nearest = [check_limits(search, count) for count in search.options.full_attention or (None,)]
    with locked(search.folder / "baselines"):  # workers that start at once measure them once
        baselines(search)
    if search.options.seconds:
        search.options = replace(search.options, evaluations=affordable(search))
    propose(search)
    if search.cost_limits and not any(trial.strategy == strategy for trial in search.feasible()):
        search.notes.append(f"{strategy} found no placement within the limits: the model's nearest one is evaluated")
        search.evaluate(nearest, NEAREST, free=True)
    return compare(search.feasible(), search.options.full_attention)


def compare(trials: Sequence[Trial], counts: Iterable[int]) -> list[Comparison]:
    """Best against best uniform, for every K that has a uniform trial. `searched` may be the uniform one itself."""
    found = []
    for count in counts:
        mine = [trial for trial in trials if trial.k == count]
        best = best_of(mine) if mine else None
        uniform = [t for t in mine if best is not None and t.strategy == UNIFORM and t.objective == best.objective]
        if best is not None and uniform:
            found.append(Comparison(count, best, best_of(uniform)))
    return found
