"""What devices would choose among placements that were scored once: the scores do not depend on the device, the speeds
do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nasbench.core.errors import UserError
from nasbench.cost import CostModel
from nasbench.search.trials import Trial, unique
from nasbench.spaces.placement import Placement


@dataclass(frozen=True)
class Choices:
    """Choices of several devices.

    Attributes:
        speeds: decode tokens/s, a row for each placement, a column for each device; NaN where it cannot run.
        chosen: a row for each device: its placement, the score, the speed as a multiple of the whole model's, `source`.
        regret: [device, other]: how much worse a score the device has with the other's choice; infinite where that is
            slower than asked.
        ranks: Spearman's correlation of the speeds between devices.
    """

    speeds: pd.DataFrame
    chosen: pd.DataFrame
    regret: pd.DataFrame
    ranks: pd.DataFrame


def choices(
    trials: Sequence[Trial], costs: Sequence[CostModel], whole: Placement, context: int, batch: int, speed_up: float
) -> Choices:
    """The placement with the lowest score on each device that decodes `speed_up` times as fast as the whole model.

    Args:
        whole: the unchanged model.
        context, batch: of the decode step.

    Raises:
        UserError: no trials, a device whose rows do not cover them, or on which none is fast enough.
    """
    scores = {trial.layers: trial.front_score for trial in unique(trials) if math.isfinite(trial.front_score)}
    if not scores:
        raise UserError("nothing to choose from: no trial has a score")
    score = np.array(list(scores.values()))
    speeds, wholes, rows, picks = {}, {}, [], {}
    for cost in costs:
        wholes[cost.device] = cost.decode(whole, context, batch).decode_tok_s or math.nan
        found = [cost.decode(placement, context, batch) for placement in scores]
        tok_s = np.array([math.nan if each.fits is False else each.decode_tok_s for each in found], dtype=float)
        ratio = tok_s / wholes[cost.device]
        fast = np.flatnonzero(ratio >= speed_up)
        if not len(fast):
            raise UserError(f"no trial decodes {speed_up:g} times as fast as the whole model on {cost.device}")
        best = fast[np.argmin(score[fast])]
        speeds[cost.device], picks[cost.device] = tok_s, best
        rows.append((cost.device, found[best].placement, score[best], tok_s[best], ratio[best], found[best].source))
    chosen = pd.DataFrame(rows, columns=["device", "placement", "score", "decode_tok_s", "speed_up", "source"])
    table = pd.DataFrame(speeds)
    regret = pd.DataFrame(
        {
            other: {
                device: score[pick] - score[own] if table[device][pick] >= speed_up * wholes[device] else math.inf
                for device, own in picks.items()
            }
            for other, pick in picks.items()
        }
    )
    return Choices(table, chosen, regret, table.rank().corr())
