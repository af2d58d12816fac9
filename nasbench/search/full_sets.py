"""Sets of full-attention layers: what the searches over them share, and moving one layer of a set at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nasbench.search.session import BATCH, Session
from nasbench.search.surrogate import Surrogate

Layers = frozenset[int]


class FullSets:
    """Sets of full layers, with the base elsewhere, for a search with a K or with limits.

    Attributes:
        scores: of every set that this strategy has seen.
        surrogate: a guess that learns from them; it orders candidates.
    """

    def __init__(self, search: Session, strategy: str) -> None:
        self.search, self.strategy = search, strategy
        self.scores: dict[Layers, float] = {}
        self.surrogate = Surrogate(search.layer_importance)

    @property
    def counts(self) -> tuple[int, ...]:
        """The wanted K; the one with the best score so far where limits decide."""
        wanted = self.search.options.full_attention
        return wanted or tuple(len(best) for best in self.best(self.scores)[:1])

    def evaluate(self, sets: Iterable[Layers], keep: int = 0) -> None:
        """Evaluates sets of full layers as far as the budget goes: those within the limits, or all as steps on the way
        where none is. `keep`: see Session.evaluate."""
        by_placement = {self.search.with_full(layers): layers for layers in sets}
        within = [placement for placement in by_placement if self.search.keeps(placement)]
        answers = self.search.evaluate(within or by_placement, self.strategy, stepping=True, keep=keep)
        self.scores.update((by_placement[placement], score) for placement, score in answers.items())

    def best(self, sets: Iterable[Layers]) -> list[Layers]:
        return sorted(sets, key=lambda layers: (self.scores[layers], sorted(layers)))

    def reached(self, count: int) -> list[Layers]:
        """The seen sets of K layers, the best first."""
        return self.best(layers for layers in self.scores if len(layers) == count)

    def missed(self, layers: Layers) -> tuple[float, list[int]]:
        """How much the score is expected to suffer where these layers lose full attention; to sort by."""
        return float(sum(self.surrogate.gains[layer] for layer in layers)), sorted(layers)

    def even_and_important(self, count: int) -> list[Layers]:
        """Where a search of K layers starts from at least: evenly spread, and the most important layers."""
        search = self.search
        important = sorted(search.space.may_be_full, key=lambda layer: (-search.layer_importance[layer], layer))[:count]
        return [search.space.evenly(count), frozenset(important)]

    def refine_all(self, starts: Mapping[int, Sequence[Layers]]) -> None:
        """For every K of the starts, an equal share of what is left of the budget: evaluates the starts, then moves one
        full layer at a time, from the best seen set, while that helps."""
        for position, count in enumerate(starts):
            left = self.search.remaining(self.strategy)
            floor = left - left // (len(starts) - position)
            self.evaluate([*starts[count], *self.even_and_important(count)])
            self.refine(count, floor)

    def refine(self, count: int, floor: int) -> None:
        """Moves one full layer at a time, from the best seen set of K, while that helps and more than `floor`
        evaluations are left."""
        search, name = self.search, self.strategy
        current = next(iter(self.reached(count)), None)
        while current is not None and search.remaining(name) > floor:
            self.surrogate.fit(self.scores)
            untried = [layers for layers in self.moves(current) if layers not in self.scores]
            if not untried:
                return
            self.evaluate(untried[: min(BATCH, search.remaining(name) - floor)], keep=1)
            current = self.reached(count)[0]

    def moves(self, layers: Layers) -> list[Layers]:
        """Every set that differs by one moved full layer, the most promising first."""
        gains = self.surrogate.gains
        swaps = [(out, to) for out in layers for to in self.search.space.may_be_full if to not in layers]
        swaps.sort(key=lambda swap: (gains[swap[0]] - gains[swap[1]], swap))
        return [layers - {out} | {to} for out, to in swaps]
