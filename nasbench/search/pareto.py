"""Dominance, the Pareto front and its hypervolume, for any number of objectives. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _costs(points: ArrayLike, maximise: Sequence[bool]) -> Floats:
    """[N, M] with every objective turned into one to minimise."""
    costs = np.array(points, dtype=np.float64).reshape(-1, len(maximise))
    return costs * np.where(np.array(maximise, dtype=bool), -1.0, 1.0)


def dominates(a: ArrayLike, b: ArrayLike, maximise: Sequence[bool]) -> bool:
    """Whether `a` [M] is nowhere worse than `b` [M] and somewhere better. NaN dominates nothing."""
    first, second = _costs(a, maximise)[0], _costs(b, maximise)[0]
    return bool((first <= second).all() and (first < second).any())


def front(points: ArrayLike, maximise: Sequence[bool]) -> NDArray[np.bool_]:
    """Marks the points that no other point dominates.

    Args:
        points: [N, M], one row per point.
        maximise: per objective, whether more is better.

    Returns:
        [N] bool. Equal points are on the front together; a point with a NaN never is.
    """
    costs = _costs(points, maximise)
    mask = np.array(~np.isnan(costs).any(axis=1))
    for index in np.flatnonzero(mask):
        rivals = costs[mask]
        beaten = (rivals <= costs[index]).all(axis=1) & (rivals < costs[index]).any(axis=1)
        mask[index] = not beaten.any()
    return mask


def hypervolume(points: ArrayLike, reference: ArrayLike, maximise: Sequence[bool]) -> float:
    """Exact volume that the points dominate, bounded by the reference point.

    Points that are not better than the reference in every objective add nothing. Two objectives take one sweep;
    more are sliced along the last one, which is meant for fronts of tens of points.

    Args:
        points: [N, M].
        reference: [M], a point worse than those of interest, in the points' own senses.
        maximise: per objective, whether more is better.
    """
    corner = _costs(reference, maximise)[0]
    costs = _costs(points, maximise)
    costs = costs[(costs < corner).all(axis=1)]
    return _volume(costs, corner)


def _volume(costs: Floats, corner: Floats) -> float:
    """Volume of the union of the boxes [cost, corner]; every cost is below the corner."""
    if len(costs) == 0:
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - costs.min())
    order = np.argsort(costs[:, -1], kind="stable")
    costs = costs[order]
    if len(corner) == 2:
        best = np.minimum.accumulate(costs[:, 0])
        heights = np.diff(np.append(costs[:, 1], corner[1]))
        return float(((corner[0] - best) * heights).sum())
    edges = np.append(costs[:, -1], corner[-1])
    depths = np.diff(edges)
    return sum(float(depth) * _volume(costs[: i + 1, :-1], corner[:-1]) for i, depth in enumerate(depths) if depth > 0)
