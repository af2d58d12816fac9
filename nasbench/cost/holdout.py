"""Holdout evaluation of the cost model: whole decode steps and prompts that calibrated nothing, predicted and measured.

The measurements lie in `holdout/<device>.csv` beside the profile database, or in any file of such rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nasbench.core.errors import UserError
from nasbench.cost.calibration import LEVEL_SD, CalibrationRow
from nasbench.cost.files import load_cost_model
from nasbench.cost.model import CostModel
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.runtime.memory import sequences_that_fit
from nasbench.spaces.placement import Placement, format_placement, parse_placement

BATCHES = (1, 2, 3, 4, 8, 16, 24, 32, 64, 100, 128, 256, 384, 512, 1024)
MEMORY = 0.85
"""Share of the memory that the batch of a point may fill."""


@dataclass(frozen=True)
class WholePoint:
    """What is measured end to end. `mode` is decode or prefill; the context of a prefill point is its prompt's."""

    mode: str
    placement: Placement
    context: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens that one step or one reading of the prompts processes."""
        return self.batch * (1 if self.mode == "decode" else self.context)


@dataclass(frozen=True)
class Comparison:
    """One measurement beside its prediction, tokens/s of all sequences together.

    Attributes:
        error: predicted / measured - 1.
        inside: whether the 90 % interval of the prediction holds the measurement.
    """

    device: str
    model: str
    mode: str
    placement: str
    context: int
    batch: int
    predicted_tok_s: float
    measured_tok_s: float
    error: float
    inside: bool
    source: str


@dataclass(frozen=True)
class Holdout:
    """Errors over all measurements; `worst` and `mean` are absolute relative errors."""

    mode: str
    rows: tuple[Comparison, ...]
    mean: float
    worst: float
    spearman: float
    inside: float

    def cells(self) -> dict[str, float | None]:
        """What tables and --json show of it; shares, rounded."""
        ranks = None if isnan(self.spearman) else round(self.spearman, 4)
        shares = {"mean_error": self.mean, "worst_error": self.worst, "in_90_percent_interval": self.inside}
        return {"points": len(self.rows), "spearman": ranks, **{name: round(x, 4) for name, x in shares.items()}}


def compare_point(
    costs: CostModel,
    point: WholePoint,
    measured_tok_s: float,
    *,
    extrapolate: bool = False,
    chunk: int | None = None,
) -> Comparison:
    """Predicts a measurement.

    Args:
        measured_tok_s: tokens/s of all sequences together.
        chunk: of the prefill; None for the largest that was profiled.

    Raises:
        UserError: the profile does not cover the point.
    """
    if point.mode == "decode":
        cost = costs.decode(point.placement, point.context, point.batch, extrapolate)
        predicted, relative = cost.decode_tok_s, (cost.step_stderr_ms or 0.0) / (cost.step_ms or 1.0)
    else:
        cost = costs.prefill(point.placement, point.context, point.batch, extrapolate, chunk)
        predicted, relative = cost.prefill_tok_s, (cost.prefill_stderr_tok_s or 0.0) / (cost.prefill_tok_s or 1.0)
    assert predicted is not None
    error = predicted / measured_tok_s - 1
    about = (costs.device, costs.shape.name, point.mode, format_placement(point.placement), point.context, point.batch)
    return Comparison(*about, predicted, measured_tok_s, error, abs(error) <= LEVEL_SD * relative, cost.source)


def summarise(mode: str, rows: Sequence[Comparison]) -> Holdout:
    """The errors of a mode. Raises UserError for no rows."""
    if not rows:
        raise UserError(f"nothing to evaluate the {mode} predictions with")
    errors = np.abs([row.error for row in rows])
    ranks = spearman([row.predicted_tok_s for row in rows], [row.measured_tok_s for row in rows])
    inside = float(np.mean([row.inside for row in rows]))
    return Holdout(mode, tuple(rows), float(errors.mean()), float(errors.max()), ranks, inside)


def evaluate(costs: CostModel, measured: Iterable[CalibrationRow]) -> tuple[dict[str, Holdout], int]:
    """(errors by mode over the rows of this model that the profile covers, number of the others)."""
    found: dict[str, list[Comparison]] = {}
    uncovered = 0
    for row in measured:
        if row.model == costs.shape.name and row.dtype == costs.dtype:
            placement = parse_placement(row.placement, costs.shape.num_layers)
            point = WholePoint(row.mode, placement, row.context, row.batch)
            try:
                comparison = compare_point(costs, point, point.tokens * 1e3 / row.time_ms, chunk=row.chunk or None)
                found.setdefault(row.mode, []).append(comparison)
            except UserError:
                uncovered += 1
    return {mode: summarise(mode, rows) for mode, rows in found.items()}, uncovered


def judge(measured: Iterable[CalibrationRow], db: Path | None = None) -> tuple[list[dict[str, Any]], list[Comparison]]:
    """Evaluates the cost model on measured steps and prompts of any devices and built-in models.

    Args:
        db: of the profiles, as nasbench.cost.load_cost_model takes it. Of measurements that calibrate them, each is
            judged by a fit without it.

    Returns:
        (one line of `Holdout.cells` for each device, model, dtype and mode, every comparison)

    Raises:
        UserError: an unknown model, a device without rows, or nothing to evaluate with.
    """
    groups: dict[tuple[str, str, str, str], list[CalibrationRow]] = {}
    for row in measured:
        groups.setdefault((row.device, row.model, row.dtype, row.mode), []).append(row)
    lines: list[dict[str, Any]] = []
    points: list[Comparison] = []
    for (device, model, dtype, mode), rows in sorted(groups.items()):
        costs = load_cost_model(device, MODELS[model], dtype, db)
        found: list[Comparison] = []
        for row in rows:
            for holdout in evaluate(costs.without(row.key), [row])[0].values():
                found += holdout.rows
        line = {"device": device, "model": model, "dtype": dtype, "mode": mode, "not_covered": len(rows) - len(found)}
        line |= {"calibrating": sum(row.key in costs.calibrated_by for row in rows), "points": 0}
        if found:
            sources = {row.source for row in found}
            line |= {"source": "estimated" if "estimated" in sources else "measured", **summarise(mode, found).cells()}
            points += found
        lines.append(line)
    if not lines:
        raise UserError("nothing to judge the cost model with: the files have no measurements")
    return lines, points


def holdout_path(profile: Path) -> Path:
    """Where the holdout measurements beside a profile database lie."""
    return profile.parent / "holdout" / profile.name


def _placements(shape: ModelSpec, names: Sequence[str], count: int, generator: random.Random) -> list[Placement]:
    """The published placement, then random ones. The share of layers of the kind with the largest cache goes from none
    to all and round again; a mix of the other kinds fills the rest, drawn layer by layer."""
    layers, full = shape.num_layers, _largest_cache(shape, names)
    steps = sorted({round(layers * share) for share in (0, 0.04, 0.07, 0.11, 0.18, 0.25, 0.36, 0.5, 0.64, 0.82, 1)})
    generator.shuffle(steps)
    others = [name for name in dict.fromkeys(names) if name != full] or [full]
    mixes = [mix for size in range(1, len(others) + 1) for mix in combinations(others, size)]
    found = [shape.placement]
    while len(found) < count:
        chosen = set(generator.sample(range(layers), steps[len(found) % len(steps)]))
        mix = generator.choice(mixes)
        found.append(tuple(full if i in chosen else generator.choice(mix) for i in range(layers)))
    return found


def _largest_cache(shape: ModelSpec, names: Sequence[str]) -> str:
    return max(names, key=lambda name: shape.mixer(name).cache_bytes(1, shape.max_context, 2))


def holdout_points(
    shape: ModelSpec,
    names: Sequence[str],
    mode: str,
    contexts: Sequence[int],
    count: int,
    *,
    memory_bytes: int,
    dtype_bytes: int,
    prompt_tokens: int,
    largest: int = BATCHES[-1],
    seed: int = 0,
) -> list[WholePoint]:
    """`count` points over placements, contexts and batches; any beginning of the list covers all three.

    Args:
        memory_bytes: of the device.
        prompt_tokens: of all prompts of a prefill point together.
        largest: batch, the largest that was profiled.
    """
    generator = random.Random(f"{seed} {mode}")
    full = _largest_cache(shape, names)
    found: list[WholePoint] = []
    for i, placement in enumerate(_placements(shape, names, count, generator)):
        context = contexts[(3 * i + i // len(contexts) + 2 * seed) % len(contexts)]
        fits = sequences_that_fit(shape, placement, context, dtype_bytes, MEMORY * memory_bytes)
        most = max(1, min(fits, largest))
        if mode == "prefill":
            # Full attention over the longest prompts takes tens of seconds on any device.
            wide = placement.count(full) > shape.num_layers // 3
            context = min(context, prompt_tokens if wide else 2 * prompt_tokens)
            # Now and then as many short prompts as the largest profiled batch.
            most = min(most, max(1, (1 if i % 8 else 2) * prompt_tokens // context))
        sizes = sorted({size for size in BATCHES if size < most} | {most})
        # The largest and one sequence by turns, and what lies between.
        share = (i * 0.618 + 0.31 * seed) % 1 if i % 4 else float(i % 8 == 0)
        found.append(WholePoint(mode, placement, context, sizes[min(len(sizes) - 1, int(share * len(sizes)))]))
    return list(dict.fromkeys(found))


def with_between(contexts: Sequence[int]) -> list[int]:
    """Contexts and their geometric means: what lies between the profiled ones is interpolated, and tested too."""
    means = [round((low * high) ** 0.5 / 64) * 64 for low, high in pairwise(sorted(contexts))]
    return sorted({*contexts, *filter(None, means)})


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN for fewer than two or for equal values alone."""
    return float(pd.Series(first).rank().corr(pd.Series(second).rank()))
