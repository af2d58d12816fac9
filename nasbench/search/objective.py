"""What a search asks of the world: the loss of placements, and their speed on the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nasbench.search.trials import Target, score
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import Space

if TYPE_CHECKING:
    from nasbench.cost import CostModel
    from nasbench.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Loss:
    """Mean loss of a token, nats, its standard error, and the KL divergence from the teacher (NaN if unknown)."""

    value: float
    stderr: float = math.nan
    kl: float = math.nan

    @property
    def score(self) -> float:
        """What placements are ranked by, lower is better."""
        return score(self.value, self.kl)


@dataclass(frozen=True)
class Speed:
    """What the cost model says of a placement on the target. `prefill_tok_s` is NaN where it is not measured."""

    decode_tok_s: float
    prefill_tok_s: float
    step_ms: float
    cache_bytes: int
    source: str


class Objective(Protocol):
    """The world as strategies see it. Both measures are deterministic for a given `version`."""

    space: Space
    target: Target
    version: str
    """Of the weights: losses of different versions are never compared."""
    reference_loss: float
    """Loss of guessing, the hypervolume's reference, nats."""

    def losses(self, placements: Sequence[Placement]) -> list[Loss]:
        """On the search split. The expensive one: many placements in one call share work."""

    def speed(self, placement: Placement) -> Speed:
        """On the target. Cheap."""

    def importance(self, names: Sequence[str]) -> Mapping[tuple[int, str], float]:
        """What putting each of the names in one layer of the otherwise unchanged model costs, in nats a token: the
        divergence from it, which a single layer moves beyond the noise of a few thousand tokens' loss."""


class RunObjective:
    """The objective of a run folder: its supernet's losses, and rows of a device's profile.

    Args:
        evaluator: of the run's supernet.
        cost: of the target device, model and dtype.
        progress: called with (what, done, total) while the layers' importance is measured.
    """

    def __init__(
        self,
        target: Target,
        evaluator: Evaluator,
        cost: CostModel,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.space = evaluator.supernet.space
        self.target = target
        self.version: str = evaluator.supernet.version
        self.reference_loss = math.log(cost.shape.vocab_size)
        self._evaluator = evaluator
        self._cost = cost
        self._progress = progress
        self._speeds: dict[Placement, Speed] = {}

    def losses(self, placements: Sequence[Placement]) -> list[Loss]:
        measured = self._evaluator.measure(list(placements), "search")
        return [Loss(scores["loss"].value, scores["loss"].stderr, scores["kl"].value) for scores in measured]

    def speed(self, placement: Placement) -> Speed:
        if placement not in self._speeds:
            cost = self._cost.cost(placement, self.target.context, self.target.batch)
            assert cost.decode_tok_s is not None, "CostModel.cost has rows or raises"
            assert cost.step_ms is not None
            prefill = math.nan if cost.prefill_tok_s is None else cost.prefill_tok_s
            self._speeds[placement] = Speed(cost.decode_tok_s, prefill, cost.step_ms, cost.cache_bytes, cost.source)
        return self._speeds[placement]

    def importance(self, names: Sequence[str]) -> Mapping[tuple[int, str], float]:
        def progress(done: int, total: int) -> None:
            self._progress("layer importance", done, total)

        rows = self._evaluator.importance(names, progress=progress)
        return {(row.layer, row.name): row.kl for row in rows}
