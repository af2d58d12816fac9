"""Strategies over whole placements. `uniform` and `random` look at no score: what any search has to beat. `sampled`
draws at random first, and then what a linear model of the scores so far expects to be best."""

from __future__ import annotations

import random

import numpy as np

from nasbench.core.errors import UserError
from nasbench.search.pareto import Floats
from nasbench.search.session import STRATEGIES, Session
from nasbench.search.trials import UNIFORM
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import full_layers

RANDOM, SAMPLED = "random", "sampled"
ROUND, DRAWN_AT_ONCE = 8, 200
"""Placements of `sampled` that are evaluated between two fits, and of how many they are the best."""


def uniform(search: Session) -> None:
    """Evaluates the uniform placements of every wanted K; all of 0..layers if none is named."""
    counts = search.options.full_attention or range(len(search.space.may_be_full))
    search.evaluate([placement for count in counts for placement in search.evenly_spread(count)], UNIFORM)


def random_placements(search: Session) -> None:
    """Evaluates random placements: full layers drawn evenly for every wanted K, and each replacement."""
    if search.options.evaluations > 100_000:
        raise UserError(f"{search.options.evaluations} evaluations are too many: choose at most 100000")
    source, space = random.Random(search.options.seed), search.space
    counts = search.options.full_attention or tuple(range(len(space.may_be_full) + 1))

    def draw(count: int) -> Placement:
        full = frozenset(source.sample(space.may_be_full, count))
        fill = tuple(source.choice(search.replacements(layer)) for layer in range(space.num_layers))
        return space.with_full_attention(fill, full)

    wanted: dict[Placement, None] = {}
    for attempt in range(20 * search.options.evaluations):
        if len(wanted) >= search.options.evaluations:
            break
        if search.keeps(placement := draw(counts[attempt % len(counts)])):
            wanted.setdefault(placement)
    search.evaluate(wanted, RANDOM)


def sampled(search: Session) -> None:
    """A third of the budget is drawn at random; the rest goes, a round at a time, to the best of many mutations of what
    was best, by a ridge regression on the names of the layers."""
    source, space = random.Random(search.options.seed), search.space
    names = [tuple(dict.fromkeys((own, *search.replacements(i)))) for i, own in enumerate(space.original)]
    keys = {key: i for i, key in enumerate((layer, name) for layer, own in enumerate(names) for name in own)}
    counts, budget = search.options.full_attention, search.options.evaluations
    scores: dict[Placement, float] = {}

    def draw(parent: Placement | None) -> Placement:
        """A mutation of a parent, or any placement, of a wanted K."""
        fill = [source.choice(search.replacements(i)) for i in range(space.num_layers)]
        if parent is None:
            count = source.choice(counts or range(len(space.may_be_full) + 1))
            return space.with_full_attention(tuple(fill), frozenset(source.sample(space.may_be_full, count)))
        full = set(full_layers(parent))
        others = [layer for layer in space.may_be_full if layer not in full]
        if full and others and source.random() < 0.7:
            full ^= {source.choice(sorted(full)), source.choice(others)}
        elif not counts:
            full ^= {source.choice(space.may_be_full)}
        changed = source.randrange(space.num_layers)
        kept = [own if own in search.replacements(i) else fill[i] for i, own in enumerate(parent)]
        kept[changed] = fill[changed]
        return space.with_full_attention(tuple(kept), frozenset(full))

    def vector(placement: Placement) -> Floats:
        found = np.zeros(len(keys))
        found[[keys[key] for key in enumerate(placement)]] = 1.0
        return found

    while search.remaining(SAMPLED) > 0:
        best = sorted(scores, key=lambda placement: (scores[placement], placement))[:ROUND]
        parents = best if 3 * len(scores) >= budget else [None]
        wanted = dict.fromkeys(draw(source.choice(parents)) for _ in range(DRAWN_AT_ONCE))
        fresh = [placement for placement in wanted if placement not in scores and search.keeps(placement)]
        if not fresh:
            return
        if best:
            x, y = np.array([vector(p) for p in scores]), np.array(list(scores.values()))
            gram = x.T @ x + np.eye(len(keys))
            weights = np.linalg.solve(gram, x.T @ (y - y.mean()))
            fresh.sort(key=lambda placement: (float(vector(placement) @ weights), placement))
        scores.update(search.evaluate(fresh[:ROUND], SAMPLED))


STRATEGIES.register(UNIFORM, uniform)
STRATEGIES.register(RANDOM, random_placements)
STRATEGIES.register(SAMPLED, sampled)
