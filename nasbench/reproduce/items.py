"""items.jsonl: what was measured of every placement, value by value, so that two placements are compared item by item.

A line is one measure of one placement: {"placement", "weights", "version", "measure", "time", "values"}, `time` in
seconds since 1970. Lines are only added; of several of one placement, weights and measure the latest counts. Processes
that measure beside the main one add to items-1.jsonl, items-2.jsonl, ...; all files of the folder are read as one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nasbench.core.files import machine_errors
from nasbench.evaluation.suite import evenly
from nasbench.reproduce.recipe import Candidate
from nasbench.spaces.placement import format_placement

DIGITS = 5
"""Of a value; enough beside its spread over items."""


@dataclass(frozen=True)
class Subject:
    """What was measured: a placement with the weights of a name ("teacher", "supernet", "final", ...)."""

    placement: str
    weights: str


def subject_of(candidate: Candidate) -> Subject:
    """What a candidate's values are kept under; several candidates may share one."""
    return Subject(format_placement(candidate.placement), candidate.weights)


class Items:
    """The values of a run. A torn line, of a killed run, is left out.

    Args:
        path: items.jsonl; the files of other processes lie beside it.
        number: of the process that adds values, whose own file is items-N.jsonl; 0 for the main one, items.jsonl.
    """

    def __init__(self, path: Path, number: int = 0) -> None:
        self.main = path
        self.path = path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path
        self.read()

    def read(self) -> None:
        """Reads all files anew: other processes add to theirs meanwhile."""
        self.values: dict[tuple[Subject, str], np.ndarray] = {}
        self.versions: dict[tuple[Subject, str], str] = {}
        self._times: dict[tuple[Subject, str], float] = {}
        self._break = ""
        others = self.main.parent.glob(f"{self.main.stem}-[0-9]*{self.main.suffix}")
        for path in (self.main, *sorted(others)):
            if path.is_file():
                self._read(path)

    def _read(self, path: Path) -> None:
        # Another process may be in the midst of a line, even of a character.
        text = path.read_text(encoding="utf-8", errors="replace")
        if path == self.path and text and not text.endswith("\n"):
            self._break = "\n"
        for line in text.splitlines():
            try:
                row = json.loads(line)
                subject, measures = Subject(row["placement"], row["weights"]), {row["measure"]: row["values"]}
                # Lines of earlier versions have no time.
                self._take(subject, row["version"], measures, row.get("time", 0.0))
            except (ValueError, KeyError, TypeError):
                continue

    def _take(self, subject: Subject, version: str, measures: Mapping[str, object], when: float) -> None:
        for measure, values in measures.items():
            key = subject, measure
            # Weights that were trained on are measured again, maybe into another file: the order of files says nothing.
            if when >= self._times.get(key, 0.0):
                self.values[key] = np.asarray(values, dtype=np.float64)
                self.versions[key] = version
                self._times[key] = when

    def has(self, subject: Subject, version: str, measure: str) -> bool:
        """Whether the measure was taken of these very weights."""
        return self.versions.get((subject, measure)) == version

    def get(self, subject: Subject, measure: str) -> np.ndarray | None:
        return self.values.get((subject, measure))

    def some(self, subject: Subject, benchmark: str, count: int) -> np.ndarray | None:
        """What `benchmark@count` is: as it was measured, or out of all items where those were asked since."""
        few, whole = (subject, f"{benchmark}@{count}"), (subject, benchmark)
        if whole in self.values and self._times[whole] >= self._times.get(few, 0.0):
            return self.values[whole][evenly(count, len(self.values[whole]))]
        return self.values.get(few)

    def add(self, subject: Subject, version: str, measures: Mapping[str, np.ndarray]) -> None:
        """Writes the values at once. Raises MachineError."""
        rounded = {measure: [_short(value) for value in values] for measure, values in measures.items()}
        when = round(time.time(), 3)
        named = {"placement": subject.placement, "weights": subject.weights, "version": version}
        rows = [{**named, "measure": measure, "time": when, "values": v} for measure, v in rounded.items()]
        with machine_errors(f"writing {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._break + "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
        self._break = ""
        self._take(subject, version, rounded, when)


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
