"""Early stopping: which placements cannot be among the best, by the first rows of the text that scores them.

The gap of a placement to a rival is the mean of their differences row by row. What further rows can change of it has a
standard error of s / sqrt(n) * sqrt(1 - n / N) after n of N rows (Cochran 1977, section 2.6); Student's t bounds it.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from nasbench.search.pareto import Floats

LEAST_ROWS, SHARE = 8, 4
"""Rows of the first look, at least, and of how many rows of all it reads one."""
ERROR = 1e-3
"""Chance that one that is dropped would have been among the best of its round, all that are dropped together."""


def first_look(rows: int) -> int:
    """Rows of the first look at a text; 0 where it is too short for one."""
    return rows // SHARE if rows >= SHARE * LEAST_ROWS else 0


def race(rows: Floats, total: int, keep: int) -> tuple[int, Floats]:
    """(the rival, the gap to it of each placement that is dropped, NaN of one that stays).

    Args:
        rows: [placements, n] scores on the first of `total` rows, lower is better.
        keep: the best so many matter; the rival is the last of them.
    """
    count, seen = rows.shape
    rival = int(np.argsort(rows.mean(1), kind="stable")[min(keep, count) - 1])
    gaps = rows - rows[rival]
    error = gaps.std(1, ddof=1) / np.sqrt(seen) * np.sqrt(1 - seen / total)
    mean = gaps.mean(1)
    return rival, np.where(mean > t_quantile(1 - ERROR / count, seen - 1) * error, mean, np.nan)


def t_quantile(p: float, freedom: int) -> float:
    """Of Student's t, by its expansion around the normal one (Abramowitz and Stegun 26.7.5, four terms)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
