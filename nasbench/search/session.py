"""One search: its options, its budget, and what every strategy works through."""

from __future__ import annotations

import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from nasbench.core.errors import UserError, unknown
from nasbench.core.provenance import utc_now
from nasbench.core.registry import Registry
from nasbench.search.objective import Measured, RunObjective
from nasbench.search.trials import (
    DRAWN,
    FILLERS,
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

log = logging.getLogger("nasbench")
BATCH = 8
"""Placements that are evaluated in one call, between two looks at the losses and two writes of the trials."""
FEWEST, MOST = 8, 1000
"""Evaluations that a time gives: the fewest for each K, the most in all."""


@dataclass(frozen=True)
class Options:
    """What a strategy is asked.

    Attributes:
        full_attention: the wanted numbers of full-attention layers, ascending; () where the strategy may choose.
        evaluations: placements that one strategy may look at; those in the memory count, so that a search that was
            stopped and started again is the search that was not stopped.
        seconds: time for the strategy, from which `evaluations` follow; 0 to take these as they are.
        random: random placements of every wanted K among the baselines.
        beam_width, candidates: of the beam: sets of layers kept a level, layers tried for each.
        replacement: the name in every layer without full attention; "" for each layer's best of those that are faster
            than full attention on the target.
        step_ms: longest decode step, for the exact strategy; 0 for no limit.
        storage: Optuna storage URL; "" for a journal file in the run folder.
    """

    full_attention: tuple[int, ...] = ()
    evaluations: int = 120
    seconds: float = 0.0
    random: int = 0
    beam_width: int = 4
    candidates: int = 8
    replacement: str = ""
    seed: int = 0
    step_ms: float = 0.0
    storage: str = ""

    def check(self, space: Space) -> None:
        """Raises UserError for a K or a replacement that the space does not have, and for sizes below 1."""
        for count in self.full_attention:
            space.check_full_attention(count)
        if self.replacement and any(
            self.replacement not in space.efficient(layer) for layer in range(space.num_layers)
        ):
            raise unknown("replacement", self.replacement, space.efficient_names)
        for name, unit in (("step_ms", "milliseconds"), ("seconds", "seconds"), ("random", "placements")):
            if not 0 <= getattr(self, name) < math.inf:
                option = name.replace("_", "-")
                raise UserError(f"bad --{option} {getattr(self, name)}: choose {unit} above 0, or 0 for no limit")
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
    known: dict[Placement, Measured] = field(default_factory=dict)

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
        kernel that is what linear attention does.
        """
        if self.options.replacement:
            return (self.options.replacement,)
        names = self.space.efficient_names
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

    def evenly_spread(self, count: int) -> list[Placement]:
        """Evenly spread placements of K full layers: with the base elsewhere, and with every replacement alone."""
        even = self.space.evenly(count)
        return list(
            dict.fromkeys(self.space.with_full_attention(fill, even) for fill in (self.base, *self.homogeneous))
        )

    def remaining(self, strategy: str) -> int:
        """Placements that the strategy may still look at."""
        return self.options.evaluations - len(self.visited.get(strategy, ()))

    def evaluate(self, placements: Iterable[Placement], strategy: str, free: bool = False) -> dict[Placement, float]:
        """Scores of the placements, as far as the strategy's budget goes; trials are written as they come.

        Args:
            free: charge no budget (baselines).
        """
        visited = self.visited.setdefault(strategy, set())
        allowed: list[Placement] = []
        for placement in dict.fromkeys(placements):
            if placement not in visited:
                if not free and len(visited) >= self.options.evaluations:
                    continue
                visited.add(placement)
            allowed.append(placement)
        answers = {}
        for start in range(0, len(allowed), BATCH):
            answers.update(self._evaluate_batch(allowed[start : start + BATCH], strategy))
            self.progress(strategy, len(visited), len(visited) if free else self.options.evaluations)
        return answers

    def _evaluate_batch(self, placements: Sequence[Placement], strategy: str) -> dict[Placement, float]:
        fresh = [self.space.check(placement) for placement in placements if placement not in self.known]
        seconds = 0.0
        if fresh:
            began = time.perf_counter()
            self.known.update(zip(fresh, self.objective.measure(fresh), strict=True))
            seconds = (time.perf_counter() - began) / len(fresh)
        rows = [self._trial(placement, strategy, seconds if placement in fresh else 0.0) for placement in placements]
        add_trials(self.path, rows)
        return {placement: self.known[placement].score for placement in placements}

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
        )

    def trials(self) -> list[Trial]:
        """All trials of this target that were scored in this way, of every strategy and every earlier search."""
        ours = self.objective.version, self.objective.text, self.objective.settings, self.objective.dtype
        return latest(read_trials(self.path, self.objective.store), self.objective.target, ours)


Strategy = Callable[[Session], None]
"""Proposes placements to `search.evaluate` until its budget is spent or it has nothing left to try. One that keeps
`Options.step_ms` says so by its attribute `keeps_step_ms`."""

STRATEGIES: Registry[Strategy] = Registry("search strategy", group="nasbench.strategies")


@dataclass(frozen=True)
class Comparison:
    """The best placement of K full-attention layers against the best evenly spread one."""

    k: int
    searched: Trial
    uniform: Trial


def baselines(search: Session) -> None:
    """The teacher, and the evenly spread and random placements of every wanted K: trials of every search, at no
    charge."""
    space, options = search.space, search.options
    search.evaluate([space.original], TEACHER, free=True)
    for count in options.full_attention:
        search.evaluate(search.evenly_spread(count), UNIFORM, free=True)
        for number in range(options.random if 0 < count < len(space.may_be_full) else 0):
            drawn = random.Random(f"{options.seed}/{number}/{count}").sample(space.may_be_full, count)
            search.evaluate([search.with_full(drawn)], f"{DRAWN}{number}", free=True)


def affordable(search: Session) -> int:
    """Evaluations for `Options.seconds`, by the time that the baselines took when they were measured. They stand in
    trials.csv: a search that goes on gets the same number."""
    known = [t.seconds for t in search.trials() if t.seconds > 0 and t.strategy.startswith((FILLERS, UNIFORM, DRAWN))]
    if not known:
        return search.options.evaluations
    least = FEWEST * max(1, len(search.options.full_attention))
    return min(MOST, max(least, int(search.options.seconds / statistics.median(known))))


def run_search(search: Session, strategy: str) -> list[Comparison]:
    """Runs one strategy after the baselines. Returns, for every wanted K, the best trial so far beside the uniform one.

    Raises:
        UserError: unknown strategy, or options that the space or the strategy does not take.
    """
    propose = STRATEGIES[strategy]
    if search.options.step_ms and not getattr(propose, "keeps_step_ms", False):
        log.warning("strategy %s ignores --step-ms: placements with longer decode steps are among its trials", strategy)
    baselines(search)
    if search.options.seconds:
        search.options = replace(search.options, evaluations=affordable(search))
    propose(search)
    return compare(search.trials(), search.options.full_attention)


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
