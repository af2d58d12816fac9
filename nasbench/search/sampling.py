"""The strategies that look at no loss: evenly spread placements, and random ones. What any search has to beat."""

from __future__ import annotations

import random

from nasbench.core.errors import UserError
from nasbench.search.session import STRATEGIES, Session
from nasbench.search.trials import UNIFORM
from nasbench.spaces.placement import Placement

RANDOM = "random"


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


STRATEGIES.register(UNIFORM, uniform)
STRATEGIES.register(RANDOM, random_placements)
