"""The cost model before measurements that it never saw: errors, ranks, and how often its interval held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nasbench.core.errors import UserError
from nasbench.cost.model import INTERVAL_SD, CostModel
from nasbench.spaces.placement import Placement, format_placement


@dataclass(frozen=True)
class Judged:
    """One measurement beside its prediction, tokens/s of all sequences together.

    Attributes:
        error: predicted / measured - 1.
        inside: whether the 90 % interval of the prediction holds the measurement.
    """

    placement: str
    context: int
    batch: int
    predicted_tok_s: float
    measured_tok_s: float
    error: float
    inside: bool
    source: str


@dataclass(frozen=True)
class Judgement:
    """Errors over all measurements; `worst` and `mean` are absolute relative errors."""

    mode: str
    rows: tuple[Judged, ...]
    mean: float
    worst: float
    spearman: float
    inside: float


def judge(
    costs: CostModel,
    measured: Iterable[tuple[Placement, int, int, float]],
    mode: str = "decode",
    *,
    extrapolate: bool = False,
    chunk: int | None = None,
) -> Judgement:
    """Predicts every measurement and compares.

    Args:
        measured: (placement, context, batch, tokens/s of all sequences); prefill: context is the prompt's length.
        mode: decode or prefill.
        chunk: of the prefill; None for the largest that was profiled.

    Raises:
        UserError: a point that the profile does not cover, or no measurement at all.
    """
    rows = []
    for placement, context, batch, tok_s in measured:
        if mode == "decode":
            cost = costs.decode(placement, context, batch, extrapolate)
            predicted, stderr = cost.decode_tok_s, cost.step_stderr_ms
            relative = (stderr or 0.0) / (cost.step_ms or 1.0)
        else:
            cost = costs.prefill(placement, context, batch, extrapolate, chunk)
            predicted = cost.prefill_tok_s
            relative = (cost.prefill_stderr_tok_s or 0.0) / (predicted or 1.0)
        assert predicted is not None
        error = predicted / tok_s - 1
        inside = abs(error) <= INTERVAL_SD * relative
        name = format_placement(placement)
        rows.append(Judged(name, context, batch, predicted, tok_s, error, inside, cost.source))
    if not rows:
        raise UserError(f"nothing to judge the {mode} predictions by")
    errors = np.abs([row.error for row in rows])
    return Judgement(
        mode,
        tuple(rows),
        float(errors.mean()),
        float(errors.max()),
        spearman([row.predicted_tok_s for row in rows], [row.measured_tok_s for row in rows]),
        float(np.mean([row.inside for row in rows])),
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN for fewer than two or for equal values alone."""
    a, b = (_ranks(np.asarray(values, dtype=float)) for values in (first, second))
    if len(a) < 2 or not a.std() or not b.std():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
