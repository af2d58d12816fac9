"""items.jsonl: what was measured of every placement, value by value, so that two placements are compared item by item.

A line is one measure of one placement: {"placement", "weights", "version", "measure", "values"}. Lines are only added;
of several of one placement, weights and measure the last counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nasbench.files import machine_errors

DIGITS = 5
"""Of a value; enough beside its spread over items."""


@dataclass(frozen=True)
class Subject:
    """What was measured: a placement with the weights of a name ("teacher", "supernet", "final", ...)."""

    placement: str
    weights: str


class Items:
    """The values of a run. A torn line, of a killed run, is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[tuple[Subject, str], np.ndarray] = {}
        self.versions: dict[tuple[Subject, str], str] = {}
        self._break = ""
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            lines = text.splitlines()
            self._break = "" if not text or text.endswith("\n") else "\n"
            for line in lines:
                try:
                    row = json.loads(line)
                    self._take(
                        Subject(row["placement"], row["weights"]), row["version"], {row["measure"]: row["values"]}
                    )
                except (ValueError, KeyError, TypeError):
                    continue

    def _take(self, subject: Subject, version: str, measures: Mapping[str, object]) -> None:
        for measure, values in measures.items():
            self.values[subject, measure] = np.asarray(values, dtype=np.float64)
            self.versions[subject, measure] = version

    def has(self, subject: Subject, version: str, measure: str) -> bool:
        """Whether the measure was taken of these very weights."""
        return self.versions.get((subject, measure)) == version

    def get(self, subject: Subject, measure: str) -> np.ndarray | None:
        return self.values.get((subject, measure))

    def add(self, subject: Subject, version: str, measures: Mapping[str, np.ndarray]) -> None:
        """Writes the values at once. Raises MachineError."""
        rounded = {measure: [_short(value) for value in values] for measure, values in measures.items()}
        rows = [
            {"placement": subject.placement, "weights": subject.weights, "version": version, "measure": m, "values": v}
            for m, v in rounded.items()
        ]
        with machine_errors(f"writing {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._break + "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
        self._break = ""
        self._take(subject, version, rounded)


def _short(value: float) -> float | int:
    value = round(float(value), DIGITS)
    return int(value) if value == int(value) else value


def mean_and_error(values: np.ndarray | None) -> tuple[float, float]:
    """Mean and its standard error; NaN where there is nothing, the error also for a single value."""
    if values is None or not len(values):
        return math.nan, math.nan
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def difference(ours: np.ndarray | None, theirs: np.ndarray | None) -> tuple[float, float]:
    """Mean of ours minus theirs over the same items, and its standard error; NaN where the items are not the same."""
    if ours is None or theirs is None or len(ours) != len(theirs):
        return math.nan, math.nan
    return mean_and_error(ours - theirs)
