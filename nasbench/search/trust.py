"""How sure a search's answer is: intervals of scores, paired comparisons, and how stable the order of placements is.

Scores are means over items: rows of text, or questions. The bootstrap (Efron 1979) draws items again, the same ones for
all placements, so that how hard the items are cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluation.ranks import kendall
from nasbench.search.trials import Trial
from nasbench.spaces.placement import Placement, format_placement

if TYPE_CHECKING:
    from nasbench.evaluation.evaluator import Evaluator
    from nasbench.search.objective import RunObjective
    from nasbench.search.session import Comparison

Floats = NDArray[np.float64]
DRAWS, ROUND = 2000, 100
"""Bootstrap samples, and how many are in memory at once."""
LEAST_ITEMS = 8
"""With fewer, the bootstrap says nothing."""
LEAST_PLACEMENTS = 5
"""With fewer, the order says nothing."""


@dataclass(frozen=True)
class Verdict:
    """Whether one placement beats another.

    Attributes:
        gain: score of the other minus its own: positive where it is better.
        low, high: 95 % interval of the gain.
        p: two-sided: how often items without a difference would show one this large.
        items: how many there are of each task, the fewest.
        split: "test", which no search has looked at, or "search": then the winner is also the luckiest of many.
    """

    k: int
    placement: str
    other: str
    gain: float
    low: float
    high: float
    p: float
    items: int
    split: str

    def __str__(self) -> str:
        how = "beats" if self.low > 0 else "is worse than" if self.high < 0 else "does not differ from"
        return (
            f"K {self.k}: {self.placement} {how} the evenly spread {self.other}: gain {self.gain:.4f} "
            f"(95 % interval {self.low:.4f} to {self.high:.4f}, p {self.p:.3f}, {self.items} items of the "
            f"{self.split} split)"
        )


@dataclass(frozen=True)
class Stability:
    """How far the order of placements is the same by other items, text or weights.

    Attributes:
        by: what is other.
        tau: Kendall's rank correlation; `low` and `high` its 95 % interval.
        first: how often the best placement stays the best; NaN where there is one other order only.
    """

    by: str
    tau: float
    low: float
    high: float
    first: float
    placements: int

    def __str__(self) -> str:
        first = "" if np.isnan(self.first) else f"; the best one stays first in {self.first:.0%}"
        return (
            f"order of {self.placements} placements by {self.by}: Kendall's tau {self.tau:.2f} "
            f"({self.low:.2f} to {self.high:.2f}){first}"
        )


@dataclass(frozen=True)
class Trust:
    """What is known of a search's answer."""

    verdicts: list[Verdict]
    stability: list[Stability]

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.verdicts, *self.stability)))


def trust(
    evaluator: Evaluator, objective: RunObjective, comparisons: Sequence[Comparison], trials: Sequence[Trial],
    every: Sequence[Trial],
) -> Trust:  # fmt: skip
    """Compares the searched placements with the evenly spread ones, and orders all trials again.

    Args:
        trials: of the objective and the present weights.
        every: of the run; those of other weights show how training changes the order.
    """
    items = Items(evaluator, objective)
    verdicts = [
        found
        for pair in comparisons
        if pair.searched.placement != pair.uniform.placement and (found := verdict(items, pair)) is not None
    ]
    layers = list(dict.fromkeys(trial.layers for trial in trials))
    stability = [items.resampled(layers), items.other_split(layers), *_other_weights(trials, every)]
    return Trust(verdicts, [found for found in stability if found is not None])


class Items:
    """The scores of an objective, item by item, in the store; lower is better."""

    def __init__(self, evaluator: Evaluator, objective: RunObjective) -> None:
        self._evaluator = evaluator
        self._terms = [(weight / scale, task) for weight, scale, task in objective.scaled_terms()]

    def of(self, placement: Placement, split: str) -> list[Floats] | None:
        """[items] of every term, times its weight; None where a term is not measured there."""
        found, context = [], self._evaluator.context(split)
        for factor, task in self._terms:
            scores = self._evaluator.known(placement, task, context)
            if scores is None or scores.samples is None or len(scores.samples) < LEAST_ITEMS:
                return None
            found.append(factor * (1.0 - scores.samples if scores.higher_is_better else scores.samples))
        return found or None

    def table(self, placements: Sequence[Placement], split: str) -> tuple[list[Placement], list[Floats]]:
        """(placements that were measured there, [placements, items] of every term)."""
        rows = {placement: row for placement in placements if (row := self.of(placement, split)) is not None}
        return list(rows), [np.array(term) for term in zip(*rows.values(), strict=True)]

    def resampled(self, placements: Sequence[Placement]) -> Stability | None:
        """The order by items that are drawn again."""
        known, terms = self.table(placements, "search")
        if len(known) < LEAST_PLACEMENTS:
            return None
        means = _means(terms)
        drawn = np.sum([_resampled(term) for term in terms], axis=0)
        taus = np.array([_tau(means, row) for row in drawn[:200]])
        first = float((drawn.argmin(axis=1) == means.argmin()).mean())
        return Stability("other items", float(taus.mean()), *_interval(taus), first, len(known))

    def other_split(self, placements: Sequence[Placement]) -> Stability | None:
        """The order by the test split."""
        known, _ = self.table(placements, "test")
        both, terms = self.table(known, "search")
        if len(both) < LEAST_PLACEMENTS:
            return None
        ours, theirs = (
            np.sum([term.mean(axis=1) for term in own], axis=0) for own in (terms, self.table(both, "test")[1])
        )
        return Stability("the test split", *kendall(ours, theirs, np.zeros(len(both))), np.nan, len(both))


def verdict(items: Items, pair: Comparison) -> Verdict | None:
    """Of the searched placement against the evenly spread one; None where they have no items in common."""
    for split in ("test", "search"):
        ours, theirs = (items.of(trial.layers, split) for trial in (pair.searched, pair.uniform))
        if ours is not None and theirs is not None:
            gaps = [other - own for own, other in zip(ours, theirs, strict=True)]
            drawn = np.sum([_resampled(gap[None])[:, 0] for gap in gaps], axis=0)
            gain = float(sum(gap.mean() for gap in gaps))
            beyond = min((drawn <= 0).mean(), (drawn >= 0).mean())
            p = min(1.0, 2 * max(float(beyond), 1 / DRAWS))
            fewest = min(map(len, gaps))
            names = format_placement(pair.searched.layers), format_placement(pair.uniform.layers)
            return Verdict(pair.k, *names, gain, *_interval(drawn), p, fewest, split)
    return None


def _other_weights(trials: Sequence[Trial], every: Sequence[Trial]) -> list[Stability]:
    """The order by weights of other supernets, or of earlier training, on the same text."""
    ours = {trial.placement: trial.score for trial in trials}
    others: dict[str, dict[str, float]] = {}
    for trial in every:
        same = trials and trial.scoring[1:] == trials[-1].scoring[1:] and trial.supernet != trials[-1].supernet
        if same and trial.placement in ours:
            others.setdefault(trial.supernet, {})[trial.placement] = trial.score
    found = []
    for version, scores in others.items():
        if len(scores) >= LEAST_PLACEMENTS:
            pair = np.array([[ours[name], score] for name, score in scores.items()]).T
            taus = kendall(pair[0], pair[1], np.zeros(len(scores)))
            found.append(Stability(f"the weights {version[:8]}", *taus, np.nan, len(scores)))
    return found


def _means(terms: Sequence[Floats]) -> Floats:
    """[placements] of the score, the sum of the terms' means."""
    return np.asarray(np.sum([term.mean(axis=1) for term in terms], axis=0))


def _resampled(term: Floats) -> Floats:
    """[DRAWS, placements] of means over items that are drawn with replacement; `term` is [placements, items]."""
    source, items = np.random.default_rng(0), term.shape[1]
    drawn = (source.multinomial(items, np.full(items, 1 / items), size=ROUND) for _ in range(DRAWS // ROUND))
    return np.concatenate([counts @ term.T / items for counts in drawn])


def _tau(one: Floats, other: Floats) -> float:
    """Kendall's tau-a."""
    upper = np.triu_indices(len(one), 1)
    signs = [np.sign(values[:, None] - values[None, :])[upper] for values in (one, other)]
    return float((signs[0] * signs[1]).mean())


def _interval(drawn: Floats) -> tuple[float, float]:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)
