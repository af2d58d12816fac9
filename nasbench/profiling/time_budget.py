"""How the time of a sweep with a limit is divided among its rows."""

from __future__ import annotations

import time
from dataclasses import replace

from nasbench.runtime.timing import Budget

ROW_S = 0.25
"""About what a row takes besides its timing: weights, caches, capture, the watch on power."""
LEAST_SECONDS, WATCHED = 0.02, 0.3
"""A sweep with a limit gives a row less time where it must, at least the first; a GPU's power is watched only while a
row has the second."""


class TimeBudget:
    """How much time the next row may take, so that as many as possible fit into a limit.

    Attributes:
        planned_s, taken_s: of the rows so far. Where others use the machine, the second is larger.
    """

    def __init__(self, limit_s: float | None) -> None:
        self.end = None if limit_s is None else time.monotonic() + limit_s
        self.group_end = self.end
        self.planned_s = self.taken_s = 0.0

    def allows(self, seconds: float) -> bool:
        """Whether a row that is planned to take so long ends before the limit."""
        pace = max(1.0, self.taken_s / self.planned_s) if self.planned_s else 1.0
        return self.end is None or time.monotonic() + pace * seconds <= self.end

    def new_group(self, share: float) -> None:
        """The next rows may take this share of what is left: the slowest rows of one kind leave time for the next."""
        if self.end is not None:
            now = time.monotonic()
            self.group_end = now + share * (self.end - now)

    def of_row(self, wanted: Budget, rows: int) -> Budget | None:
        """Of the next of so many rows; None when the time is up."""
        if self.end is None or self.group_end is None:
            return wanted
        now = time.monotonic()
        if now >= self.group_end:
            return None
        each_s = (self.end - now) / rows
        if each_s - ROW_S >= wanted.seconds:
            return wanted
        return replace(
            wanted, seconds=max(LEAST_SECONDS, each_s - ROW_S), watch=wanted.watch if each_s > WATCHED else 0.0
        )
