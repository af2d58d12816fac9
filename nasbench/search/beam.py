"""Beam search for the layers that keep full attention, after arXiv 2508.15884 (stage 1), and greedy selection.

The set of full layers grows by one layer a level, so that a search to the largest K passes all smaller ones. Where the
budget does not last for every candidate, those are tried that a guess, learning from every evaluation, puts first.

`beam` keeps several sets a level. At every wanted K the best of them, the evenly spread set and the K most important
layers are then refined by moving one full layer at a time. `kl-greedy` (arXiv 2512.20569) keeps one set: the layer is
restored that lowers the score the most, one after another. `greedy-swap` does so too, and refines the best of its own
and of all earlier searches' sets, whatever their objective.

`kl-remove` goes the other way: it starts from the model itself, and takes full attention from the layer that misses it
the least, one after another. `one-swap` trains and searches nothing: it keeps the layers that cost the most when they
alone are replaced.
"""

from __future__ import annotations

import math

from nasbench.search.full_sets import FullSets, Layers
from nasbench.search.session import STRATEGIES, Session
from nasbench.search.trials import Trial, best_of, read_trials
from nasbench.spaces.space import full_layers

BEAM = "beam"
GREEDY = "kl-greedy"
GREEDY_SWAP = "greedy-swap"
REMOVAL = "kl-remove"
ONE_SWAP = "one-swap"
GROWTH_SHARE = 0.6
"""Part of the budget that growing may take where the rest refines."""


class Growth(FullSets):
    """Sets that grow from none on."""

    def grow(self, depth: int, width: int, candidates: int, share: float) -> None:
        """Grows to `depth` full layers within a share of the budget.

        Args:
            width: sets that are kept a level.
            candidates: layers that are tried for each.
        """
        search, name = self.search, self.strategy
        evaluations = search.options.evaluations
        budget = search.remaining(name) - round(evaluations * (1 - share))
        self.evaluate([frozenset()])
        sets: list[Layers] = [frozenset()]
        for level in range(1, depth + 1):
            self.surrogate.fit(self.scores)
            spent = evaluations - search.remaining(name)
            allowance = max(1, (budget - spent) // (depth - level + 1))
            self.evaluate(self.children(sets, candidates)[:allowance], keep=width)
            sets = self.reached(level)[:width]
            if not sets:
                break

    def children(self, sets: list[Layers], candidates: int) -> list[Layers]:
        """Sets of one layer more, the most promising first."""
        guesses: dict[Layers, float] = {}
        gains = self.surrogate.gains
        for parent in sets:
            free = [layer for layer in self.search.space.may_be_full if layer not in parent]
            free.sort(key=lambda layer: (-gains[layer], layer))
            for layer in free[:candidates]:
                child = parent | {layer}
                guesses[child] = min(guesses.get(child, math.inf), self.scores[parent] - gains[layer])
        return sorted(guesses, key=lambda child: (guesses[child], sorted(child)))


def beam(search: Session) -> None:
    """The strategy."""
    run, options = Growth(search, BEAM), search.options
    run.grow(search.most, options.beam_width, options.candidates, GROWTH_SHARE)
    run.refine_all(dict.fromkeys(run.counts, ()))


def kl_greedy(search: Session) -> None:
    """The strategy."""
    run = Growth(search, GREEDY)
    run.grow(search.most, 1, search.space.num_layers, 1.0)


def greedy_swap(search: Session) -> None:
    """The strategy."""
    run = Growth(search, GREEDY_SWAP)
    run.grow(search.most, 1, search.space.num_layers, GROWTH_SHARE)
    # Its own earlier trials are no starts: a search that goes on takes the same way again.
    earlier = [
        trial
        for trial in read_trials(search.path, search.objective.store)
        if trial.supernet == search.objective.version
        and (trial.strategy, trial.objective) != (GREEDY_SWAP, search.objective.text)
    ]
    starts: dict[int, list[Layers]] = {}
    for count in run.counts:
        ways: dict[tuple[str, str], list[Trial]] = {}
        for trial in earlier:
            if trial.k == count:
                ways.setdefault((trial.strategy, trial.objective), []).append(trial)
        starts[count] = [full_layers(best_of(mine).layers) for mine in ways.values()]
    run.refine_all(starts)


def kl_remove(search: Session) -> None:
    """The strategy."""
    run, full = FullSets(search, REMOVAL), frozenset(search.space.may_be_full)
    least = min(search.options.full_attention, default=0)
    run.evaluate([full])
    for count in range(len(full) - 1, least - 1, -1):
        if not (larger := run.reached(count + 1)):
            return
        run.surrogate.fit(run.scores)
        children = sorted((larger[0] - {layer} for layer in larger[0]), key=lambda left: run.missed(full - left))
        allowance = search.remaining(REMOVAL) // (count - least + 1)
        run.evaluate(children[: max(1, allowance)], keep=1)


def one_swap(search: Session) -> None:
    """The strategy."""
    run = FullSets(search, ONE_SWAP)
    costs = search.objective.importance(search.faster, by_score=True)
    gains = [costs.get((layer, name), 0.0) for layer, name in enumerate(search.base)]
    order = sorted(search.space.may_be_full, key=lambda layer: (-gains[layer], layer))
    for count in search.options.full_attention or range(search.most, -1, -1):
        run.evaluate([frozenset(order[:count])])


for _name, _strategy in (
    (BEAM, beam), (GREEDY, kl_greedy), (GREEDY_SWAP, greedy_swap), (REMOVAL, kl_remove), (ONE_SWAP, one_swap)
):  # fmt: skip
    _strategy.needs_count = True  # type: ignore[attr-defined]
    STRATEGIES.register(_name, _strategy)
