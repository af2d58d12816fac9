"""One number that says how good a placement is at one task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A task's result.

    Attributes:
        task: as written to --tasks, e.g. `loss`, `retrieval@512`.
        metric: what the value is: "nats", "accuracy".
        value: the mean over the items.
        stderr: standard error of that mean over the items (sequences, questions); NaN for a single item.
        n: items.
        higher_is_better: False for losses.
    """

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool

    @property
    def goodness(self) -> float:
        """The value, negated where lower is better: larger is always better."""
        return self.value if self.higher_is_better else -self.value
