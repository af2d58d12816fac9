"""One search: its options, its budget, and the memory of trials that every strategy works through."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from nasbench.core.errors import UserError, unknown
from nasbench.core.registry import Registry
from nasbench.search.objective import Loss, Objective
from nasbench.search.trials import (
    FILLERS,
    TEACHER,
    UNIFORM,
    Trial,
    add_trials,
    best_of,
    k_of,
    latest,
    read_trials,
)
from nasbench.spaces.placement import Placement, format_placement, kind_of, uniform_placement
from nasbench.spaces.space import Space

BATCH = 8
"""Placements that are evaluated in one call, between two looks at the losses and two writes of the trials."""


@dataclass(frozen=True)
class Options:
    """What a strategy is asked.

    Attributes:
        full_attention: the wanted numbers of full-attention layers, ascending; () where the strategy may choose.
        evaluations: placements that one strategy may look at; those in the memory count, so that a search that was
            stopped and started again is the search that was not stopped.
        beam_width, candidates: of the beam: sets of layers kept a level, layers tried for each.
        filler: the name in every layer without full attention; "" for each layer's best of those that are faster than
            full attention on the target.
        step_ms: longest decode step, for the exact strategy; 0 for no limit.
        storage: Optuna storage URL; "" for a journal file in the run folder.
    """

    full_attention: tuple[int, ...] = ()
    evaluations: int = 120
    beam_width: int = 4
    candidates: int = 8
    filler: str = ""
    seed: int = 0
    step_ms: float = 0.0
    storage: str = ""

    def check(self, space: Space) -> None:
        """Raises UserError for a K or a filler that the space does not have, and for sizes below 1."""
        for count in self.full_attention:
            space.check_full_attention(count)
        if self.filler and any(self.filler not in space.fillers(layer) for layer in range(space.num_layers)):
            raise unknown("filler", self.filler, [name for name in space.names if name != "A"])
        for name in ("evaluations", "beam_width", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}: choose 1 or more")


Progress = Callable[[str, int, int], None]
"""Called with (what is being done, evaluations done, evaluations allowed)."""


@dataclass
class Search:
    """What a strategy works with. It proposes placements to `evaluate`, and reads the answers."""

    folder: Path
    objective: Objective
    options: Options
    progress: Progress = lambda what, done, total: None
    visited: dict[str, set[Placement]] = field(default_factory=dict)
    losses: dict[Placement, Loss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options.check(self.space)
        for trial in read_trials(self.path):
            if trial.supernet == self.objective.version and trial.target.dtype == self.objective.target.dtype:
                self.losses.setdefault(trial.layers, Loss(trial.loss, trial.loss_stderr, trial.kl))

    @property
    def space(self) -> Space:
        return self.objective.space

    @property
    def path(self) -> Path:
        return self.folder / "trials.csv"

    @cached_property
    def importance(self) -> Mapping[tuple[int, str], float]:
        """What each (layer, useful name) costs alone; full attention is 0."""
        return self.objective.importance(self.useful)

    @cached_property
    def useful(self) -> tuple[str, ...]:
        """The filler asked for, or the names that are faster than full attention on the target (all, if none is).

        A layer that is slower than the attention it replaces can only lose: on a short context or without a fast
        kernel that is what linear attention does.
        """
        if self.options.filler:
            return (self.options.filler,)
        names = [name for name in self.space.names if kind_of(name) != "A"]
        full_ms = self.objective.speed(self.space.original).step_ms
        fast = [name for name in names if self._alone_ms(name) < full_ms]
        return tuple(fast or names)

    def _alone_ms(self, name: str) -> float:
        """A decode step with the name wherever it is legal."""
        chosen = tuple(name if name in legal else legal[0] for legal in self.space.choices)
        return self.objective.speed(chosen).step_ms

    def fillers(self, layer: int) -> tuple[str, ...]:
        """The useful names of a layer; all its fillers where none of them is."""
        legal = self.space.fillers(layer)
        return tuple(name for name in legal if name in self.useful) or legal

    @cached_property
    def base(self) -> Placement:
        """The filler of every layer: the one asked for, or the one that costs the layer the least, or the same in all
        layers where that scores better: what layers cost alone does not add up."""
        if self.options.filler:
            return (self.options.filler,) * self.space.num_layers
        mixed = tuple(
            min(self.fillers(layer), key=lambda name: self.importance.get((layer, name), math.inf))
            for layer in range(self.space.num_layers)
        )
        scores = self.evaluate(dict.fromkeys([mixed, *self.pure]), FILLERS, free=True)
        return min(scores, key=lambda placement: (scores[placement], placement != mixed, placement))

    @property
    def pure(self) -> list[Placement]:
        """No full attention, one useful filler in all layers."""
        layers = self.space.num_layers
        return [(name,) * layers for name in self.useful if all(name in legal for legal in self.space.choices)]

    def with_full(self, layers: Iterable[int]) -> Placement:
        """Full attention at `layers`, the filler elsewhere."""
        return self.space.with_full_attention(self.base, frozenset(layers))

    @cached_property
    def worth(self) -> tuple[float, ...]:
        """What full attention in a layer saves, measured alone."""
        return tuple(self.importance.get((layer, name), 0.0) for layer, name in enumerate(self.base))

    def uniforms(self, count: int) -> list[Placement]:
        """Evenly spread placements of K full layers: with the base's fillers, and with every useful filler alone."""
        layers = self.space.num_layers
        even = frozenset(i for i, name in enumerate(uniform_placement(layers, count, "-")) if name == "A")
        fills = [self.base, *self.pure]
        return list(dict.fromkeys(self.space.with_full_attention(fill, even) for fill in fills))

    def remaining(self, strategy: str) -> int:
        """Placements that the strategy may still look at."""
        return self.options.evaluations - len(self.visited.get(strategy, ()))

    def evaluate(self, placements: Iterable[Placement], strategy: str, free: bool = False) -> dict[Placement, float]:
        """Scores of the placements (`Loss.score`), as far as the strategy's budget goes; trials are written as they
        come.

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
        unknown_ones = [self.space.check(placement) for placement in placements if placement not in self.losses]
        seconds = 0.0
        if unknown_ones:
            began = time.perf_counter()
            self.losses.update(zip(unknown_ones, self.objective.losses(unknown_ones), strict=True))
            seconds = (time.perf_counter() - began) / len(unknown_ones)
        fresh = set(unknown_ones)
        add_trials(self.path, [self._trial(p, strategy, seconds if p in fresh else 0.0) for p in placements])
        return {placement: self.losses[placement].score for placement in placements}

    def _trial(self, placement: Placement, strategy: str, seconds: float) -> Trial:
        loss, speed, target = self.losses[placement], self.objective.speed(placement), self.objective.target
        return Trial(
            trial=0,
            strategy=strategy,
            k=k_of(placement),
            placement=format_placement(placement),
            loss=loss.value,
            loss_stderr=loss.stderr,
            kl=loss.kl,
            decode_tok_s=speed.decode_tok_s,
            prefill_tok_s=speed.prefill_tok_s,
            cache_bytes=speed.cache_bytes,
            step_ms=speed.step_ms,
            device=target.device,
            context=target.context,
            batch=target.batch,
            dtype=target.dtype,
            source=speed.source,
            seconds=round(seconds, 3),
            created_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            supernet=self.objective.version,
        )

    def trials(self) -> list[Trial]:
        """All trials of this target and these weights, of every strategy and every earlier search."""
        return latest(read_trials(self.path), self.objective.target, self.objective.version)


Strategy = Callable[[Search], None]
"""Proposes placements to `search.evaluate` until its budget is spent or it has nothing left to try."""

STRATEGIES: Registry[Strategy] = Registry("search strategy", group="nasbench.strategies")


@dataclass(frozen=True)
class Comparison:
    """The best placement of K full-attention layers against the best evenly spread one."""

    k: int
    searched: Trial
    uniform: Trial


def baselines(search: Search) -> None:
    """The teacher and the uniform placements of every wanted K: trials of every search, at no charge."""
    search.evaluate([search.space.original], TEACHER, free=True)
    for count in search.options.full_attention:
        search.evaluate(search.uniforms(count), UNIFORM, free=True)


def run_search(search: Search, strategy: str) -> list[Comparison]:
    """Runs one strategy after the baselines. Returns, for every wanted K, the best trial so far beside the uniform one.

    Raises:
        UserError: unknown strategy, or options that the space or the strategy does not take.
    """
    propose = STRATEGIES[strategy]
    baselines(search)
    propose(search)
    return compare(search.trials(), search.options.full_attention)


def compare(trials: Sequence[Trial], counts: Iterable[int]) -> list[Comparison]:
    """Best against best uniform, for every K that has a uniform trial. `searched` may be the uniform one itself."""
    found = []
    for count in counts:
        mine = [trial for trial in trials if trial.k == count]
        uniform = [trial for trial in mine if trial.strategy == UNIFORM]
        if uniform:
            found.append(Comparison(count, best_of(mine), best_of(uniform)))
    return found
