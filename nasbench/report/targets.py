"""What was searched for a target, and which placement of its front to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from nasbench.core.sizes import format_size
from nasbench.evaluation.scores import Gap
from nasbench.report.comparison import Comparison
from nasbench.search.trials import TEACHER, UNIFORM, FrontRow, Target, Trial, latest, unique
from nasbench.search.validation import ValidationRow
from nasbench.spaces.placement import Placement, format_placement

TOLERANCE = 0.05
"""Increase of perplexity that the recommendation accepts."""
SHARE = 0.25
"""The same where the objective is a mix of tasks: a share of what the fastest placement costs."""


@dataclass(frozen=True)
class Point:
    """One point of a front, with what the report says beside it.

    Attributes:
        price: front score above the full-attention model's: nats a token where the objective is loss or KL.
        delta: loss above the full-attention model's on the search split, nats.
        test: the same on the text that no search saw; NaN and n = 0 where not evaluated.
        measured_tok_s: decode end to end, NaN where not validated; `measured_utc` when.
        speedup: decode tokens/s over the full-attention model's. Both are measured where `measured`, else predicted.
        identical: it scored exactly as the model does, so that this text cannot tell them apart.
    """

    row: FrontRow
    price: float
    delta: float
    test: Gap
    measured_tok_s: float
    measured_utc: str
    speedup: float
    measured: bool
    identical: bool

    @property
    def estimated(self) -> bool:
        return self.row.source == "estimated"

    @property
    def hybrid(self) -> bool:
        """Whether it can be recommended: not the model itself, nor what cannot be told from it."""
        return self.row.strategy != TEACHER and not self.identical

    @property
    def tok_s(self) -> float:
        """Decode tokens/s of the speed-up's kind."""
        return self.measured_tok_s if self.measured else self.row.decode_tok_s

    @property
    def basis(self) -> str:
        """Of `tok_s` and `speedup`: measured, predicted or estimated."""
        return "measured" if self.measured else "estimated" if self.estimated else "predicted"


@dataclass(frozen=True)
class TargetFacts:
    """What was searched for one target; `even` has every evenly spread placement, also those that searches found."""

    target: Target
    full: Trial | None
    trials: list[Trial]
    even: list[Trial]
    points: list[Point]

    @property
    def by_loss(self) -> bool:
        """Whether the front sets the loss against the speed; else a mix of tasks."""
        return not self.points or self.points[0].row.objective in ("loss", "kl")

    @property
    def measure(self) -> str:
        """What the front sets against the speed."""
        return "loss, nats a token" if self.by_loss else f"score of {self.points[0].row.objective}"

    @property
    def hypervolume(self) -> float:
        return self.points[0].row.hypervolume if self.points else math.nan

    @property
    def estimated(self) -> bool:
        return any(trial.source == "estimated" for trial in self.trials)

    @property
    def identical(self) -> list[str]:
        """Placements that scored exactly as the model does."""
        return [trial.placement for trial in self.trials if self.full and is_identical(trial, self.full)]


def is_identical(trial: Trial, full: Trial) -> bool:
    """Whether a placement scored exactly as the model: a window that holds the whole text is full attention there."""
    same = trial.score == full.score and (trial.loss == full.loss or math.isnan(trial.loss))
    return same and trial.placement != full.placement


def target_facts(
    target: Target,
    trials: Sequence[Trial],
    fronts: Sequence[FrontRow],
    validation: Sequence[ValidationRow],
    original: Placement,
    compared: Comparison,
) -> TargetFacts:
    """The facts of one target, with measured speeds and losses on other text beside its front."""
    mine = latest(trials, target)
    mine = [trial for trial in mine if trial.scoring == mine[-1].scoring]
    text = format_placement(original)
    full = next((trial for trial in mine if trial.placement == text), None)
    measured = {
        row.placement: row
        for row in validation
        if (row.device, row.context, row.batch, row.dtype or target.dtype) == astuple(target)
    }
    whole, base = measured.get(text), next((r for r in fronts if r.target == target and r.placement == text), None)
    points = []
    for row in sorted((row for row in fronts if row.target == target), key=lambda row: row.rank):
        seen = measured.get(row.placement)
        gain = row.decode_tok_s / full.decode_tok_s if full else math.nan
        points.append(
            Point(
                row=row,
                price=row.front_score - full.front_score if full else math.nan,
                delta=row.loss - full.loss if full else math.nan,
                test=_test_gap(compared.above_teacher(row.placement), row, base),
                measured_tok_s=seen.measured_tok_s if seen else math.nan,
                measured_utc=seen.measured_utc if seen else "",
                speedup=seen.measured_tok_s / whole.measured_tok_s if seen and whole else gain,
                measured=bool(seen and whole),
                identical=full is not None and is_identical(row, full),
            )
        )
    even = [trial for trial in mine if trial.strategy == UNIFORM]
    return TargetFacts(target, full, unique(mine), even, points)


def _test_gap(gap: Gap, row: FrontRow, base: FrontRow | None) -> Gap:
    """Item by item where the items are known, else of the means that older searches kept, without an interval."""
    mean = row.loss_test - base.loss_test if base else math.nan
    return gap if gap.n or math.isnan(mean) else Gap(mean, math.nan, 1)


def choices(target: TargetFacts) -> list[Point]:
    """The hybrids of the front from the most accurate to the fastest: what a budget of accuracy chooses among. Those
    that keep to the search's limits, where there are any."""
    hybrids = [point for point in target.points if point.hybrid]
    within = [point for point in hybrids if point.row.excess == 0]
    return sorted(within or hybrids, key=lambda point: (point.price, -point.row.decode_tok_s))


def recommended(target: TargetFacts, budget: float | None = None) -> Point | None:
    """The fastest hybrid of the front within the budget, the most accurate one where none is.

    Args:
        budget: of the front score above the model's; by default TOLERANCE where the score is a loss, else SHARE of what
            the fastest placement costs.
    """
    found = choices(target)
    if not found:
        return None
    if budget is None:
        budget = math.log1p(TOLERANCE) if target.by_loss else SHARE * found[-1].price
    return next((point for point in reversed(found) if point.price <= budget), found[0])


def target_words(target: Target) -> str:
    """`nvidia-h200, context 8k, batch 4, bf16`."""
    return f"{target.device}, context {format_size(target.context)}, batch {target.batch}, {target.dtype}"
