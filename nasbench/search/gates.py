"""Gates that are learnt on the supernet, after FlashMorph (arXiv 2606.30562; nasbench.evaluation.gates): every layer's
gradient comes out of one backward pass. The K layers with the largest gates keep full attention; the rest of the budget
moves one full layer at a time from there."""

from __future__ import annotations

import numpy as np

from nasbench.search.full_sets import FullSets
from nasbench.search.session import STRATEGIES, Session

NAME = "gates"
SHARE = 0.5
"""Part of the budget that learning takes."""
STEP = 6
"""Evaluations that one step takes as long as: the teacher, both mixers of every layer, and the way back."""


def gates(search: Session) -> None:
    """The strategy."""
    run, options, free = FullSets(search, NAME), search.options, search.space.may_be_full
    counts = options.full_attention or [k for k in (search.most >> power for power in range(8)) if k]
    steps = int(SHARE * search.remaining(NAME)) // STEP
    search.charge(NAME, STEP * steps)
    # The layers' order by what each costs alone, evenly between 1 and -1.
    order = sorted(range(search.space.num_layers), key=lambda layer: -search.layer_importance[layer])
    start = np.empty(len(order))
    start[order] = np.linspace(1.0, -1.0, len(order))
    found = search.objective.gates(search.base, start.tolist(), counts, steps, options.seed)
    largest = {
        count: frozenset(sorted(free, key=lambda layer: (-learnt[layer], layer))[:count])
        for count, learnt in found.items()
    }
    if options.full_attention:
        run.refine_all({count: [largest[count]] for count in counts})
    else:
        run.evaluate(largest.values())
        run.refine_all({count: [largest[count]] if count in largest else [] for count in run.counts})


gates.needs_count = True  # type: ignore[attr-defined]
STRATEGIES.register(NAME, gates)
