"""Beam search for the layers that keep full attention, after arXiv 2508.15884 (stage 1), with a budget.

The set of full layers grows by one layer a level, so that a search to the largest K passes all smaller ones. At every
wanted K the best of the beam, the uniform placements and the K most important layers is then refined by moving one
full layer at a time. Candidates are tried in the order of a guess that learns (nasbench.search.surrogate).
"""

from __future__ import annotations

from nasbench.core.errors import UserError
from nasbench.search.session import BATCH, STRATEGIES, Search
from nasbench.search.surrogate import Surrogate
from nasbench.spaces.space import full_attention_layers

NAME = "beam"
GROWTH_SHARE = 0.6
"""Part of the budget that growing may take; the rest refines."""

Layers = frozenset[int]


class Beam:
    """One beam search. `losses` holds every set of full layers seen, with the base's fillers elsewhere."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.losses: dict[Layers, float] = {}
        self.surrogate = Surrogate(search.worth)

    def evaluate(self, sets: list[Layers]) -> None:
        """Evaluates sets of full layers as far as the budget goes."""
        by_placement = {self.search.with_full(layers): layers for layers in sets}
        answers = self.search.evaluate(by_placement, NAME)
        self.losses.update((by_placement[placement], loss) for placement, loss in answers.items())

    def grow(self, depth: int) -> None:
        """Grows the beam to `depth` full layers within the growth share of the budget."""
        options = self.search.options
        budget = self.search.remaining(NAME) - round(options.evaluations * (1 - GROWTH_SHARE))
        self.evaluate([frozenset()])
        beam: list[Layers] = [frozenset()]
        for level in range(1, depth + 1):
            self.surrogate.fit(self.losses)
            spent = options.evaluations - self.search.remaining(NAME)
            allowance = max(1, (budget - spent) // (depth - level + 1))
            self.evaluate(self.children(beam)[:allowance])
            reached = [layers for layers in self.losses if len(layers) == level]
            if not reached:
                break
            beam = self.best(reached)[: options.beam_width]

    def children(self, beam: list[Layers]) -> list[Layers]:
        """Sets of one layer more, the most promising first; `candidates` of each parent."""
        guesses: dict[Layers, float] = {}
        for parent in beam:
            loss = self.losses[parent]
            free = [layer for layer in range(self.search.space.num_layers) if layer not in parent]
            free.sort(key=lambda layer: (-self.surrogate.gains[layer], layer))
            for layer in free[: self.search.options.candidates]:
                child = parent | {layer}
                guesses[child] = min(guesses.get(child, float("inf")), loss - self.surrogate.gains[layer])
        return sorted(guesses, key=lambda child: (guesses[child], sorted(child)))

    def best(self, sets: list[Layers]) -> list[Layers]:
        return sorted(sets, key=lambda layers: (self.losses[layers], sorted(layers)))

    def refine(self, count: int, budget: int) -> None:
        """Moves one full layer at a time, from the best start, while that helps and the budget lasts."""
        search = self.search
        floor = max(0, search.remaining(NAME) - budget)
        even = [p for p in search.uniforms(count) if p == search.with_full(full_attention_layers(p))]
        important = sorted(range(search.space.num_layers), key=lambda layer: (-search.worth[layer], layer))[:count]
        self.evaluate([*(full_attention_layers(placement) for placement in even), frozenset(important)])
        reached = [layers for layers in self.losses if len(layers) == count]
        if not reached:
            return
        current = self.best(reached)[0]
        while search.remaining(NAME) > floor:
            self.surrogate.fit(self.losses)
            untried = [layers for layers in self.moves(current) if layers not in self.losses]
            if not untried:
                return
            tried = untried[: min(BATCH, search.remaining(NAME) - floor)]
            self.evaluate(tried)
            current = self.best([current, *(layers for layers in tried if layers in self.losses)])[0]

    def moves(self, layers: Layers) -> list[Layers]:
        """Every set that differs by one moved full layer, the most promising first."""
        gains = self.surrogate.gains
        swaps = [(out, to) for out in layers for to in range(self.search.space.num_layers) if to not in layers]
        swaps.sort(key=lambda swap: (gains[swap[0]] - gains[swap[1]], swap))
        return [layers - {out} | {to} for out, to in swaps]


def beam(search: Search) -> None:
    """The strategy. Raises UserError if no K was asked for."""
    counts = search.options.full_attention
    if not counts:
        raise UserError("beam search needs the number of full-attention layers: --full-attention K[,K...]")
    run = Beam(search)
    run.grow(max(counts))
    for position, count in enumerate(counts):
        run.refine(count, search.remaining(NAME) // (len(counts) - position))


STRATEGIES.register(NAME, beam)
