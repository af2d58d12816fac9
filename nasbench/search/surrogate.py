"""Which full-attention layers to try next: a linear guess of the loss that learns from every evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from nasbench.search.pareto import Floats


class Surrogate:
    """Ridge regression of the loss on which layers keep full attention, pulled towards the layers' measured importance.

    loss ~ c - sum of gain[layer] over the full layers. With few evaluations the gains are the importances scaled to
    the losses seen; each evaluation moves them. It only orders candidates, so that being wrong costs evaluations.

    Args:
        importance: what full attention in each layer saves, measured alone.
        strength: how many evaluations the prior weighs against.
    """

    def __init__(self, importance: Iterable[float], strength: float = 2.0) -> None:
        self.prior = np.maximum(np.array(list(importance), dtype=np.float64), 0.0)
        self.strength = strength
        self.gains: Floats = self.prior

    def fit(self, losses: Mapping[frozenset[int], float]) -> None:
        """Learns from all (full layers -> loss) seen so far."""
        if len(losses) < 2:
            return
        layers = len(self.prior)
        present = np.array([[layer in full for layer in range(layers)] for full in losses], dtype=np.float64)
        values = np.array(list(losses.values()), dtype=np.float64)
        features, targets = present - present.mean(0), -(values - values.mean())
        predicted = features @ self.prior
        energy = float(predicted @ predicted)
        scale = max(0.0, float(predicted @ targets) / energy) if energy > 0 else 1.0
        prior = self.prior * scale
        ridge = self.strength * max(float(features.var(0).max()), 1e-3)
        gram = features.T @ features + ridge * np.eye(layers)
        self.gains = prior + np.linalg.solve(gram, features.T @ (targets - features @ prior))
