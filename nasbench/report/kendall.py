"""Rank correlation with an interval."""

from __future__ import annotations

import math

import numpy as np

DRAWS = 1000
"""Of items, for the interval."""


def kendall(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Kendall's tau-b (Kendall 1945) of the pairs within groups, and the bounds of 95 % of it over items drawn anew.

    Args:
        x, y: (n,) values of the same items.
        groups: (n,); pairs of different groups do not count. All NaN where x or y ties in every pair.
    """
    same = groups[:, None] == groups[None, :]
    of_x, of_y = (np.sign(values[:, None] - values[None, :]) * same for values in (x, y))
    # How often each item is drawn; the first row is the items as they are.
    drawn = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), size=DRAWS)
    weights = np.vstack([np.ones(len(x)), drawn])
    together, alone_x, alone_y = (
        ((weights @ matrix) * weights).sum(axis=1) for matrix in (of_x * of_y, of_x**2, of_y**2)
    )
    whole = np.sqrt(alone_x * alone_y)
    taus = np.divide(together, whole, out=np.full(len(weights), math.nan), where=whole > 0)
    if math.isnan(taus[0]):
        return math.nan, math.nan, math.nan
    low, high = np.nanpercentile(taus[1:], (2.5, 97.5))
    return float(taus[0]), float(low), float(high)
