"""KL-guided greedy selection (arXiv 2512.20569): from no full-attention layer on, the layer whose restoration lowers
the KL divergence from the teacher the most is restored, one after another. Forward passes only.

A search to the largest K passes all smaller ones. Where the budget does not last for every layer at every level, the
layers that are worth most alone are tried.
"""

from __future__ import annotations

from nasbench.core.errors import UserError
from nasbench.search.session import STRATEGIES, Search

NAME = "kl-greedy"


def kl_greedy(search: Search) -> None:
    """The strategy. Raises UserError if no K was asked for."""
    counts = search.options.full_attention
    if not counts:
        raise UserError("kl-greedy needs the number of full-attention layers: --full-attention K[,K...]")
    layers = range(search.space.num_layers)
    by_worth = sorted(layers, key=lambda layer: (-search.worth[layer], layer))
    chosen: frozenset[int] = frozenset()
    depth = min(max(counts), search.space.num_layers)
    search.evaluate([search.with_full(chosen)], NAME)
    for level in range(1, depth + 1):
        allowance = max(1, search.remaining(NAME) // (depth - level + 1))
        free = [layer for layer in by_worth if layer not in chosen][:allowance]
        sets = {search.with_full(chosen | {layer}): chosen | {layer} for layer in free}
        answered = search.evaluate(sets, NAME)
        if not answered:
            return
        chosen = sets[min(answered, key=lambda placement: (answered[placement], placement))]


STRATEGIES.register(NAME, kl_greedy)
