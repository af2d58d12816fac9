"""Scores of runs made before nasbench.evaluation.scores: evals.csv (means), items.jsonl (values of a reproduction)."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError
from nasbench.spaces.placement import format_placement, parse_placement

if TYPE_CHECKING:
    from nasbench.evaluation.scores import ScoreKey, Scores

ITEMS = "items.jsonl"
"""The settings of a score out of items.jsonl, which did not keep them."""
LOWER = ("loss", "kl")
"""The measures of items.jsonl of which less is better."""
log = logging.getLogger("nasbench")


def read_old_scores(run: Path) -> dict[ScoreKey, Scores]:
    """What the old files of a run folder hold. A bad row is left out with a warning: it can be measured again."""
    found = dict(_evals(run / "evals.csv"))
    lines = [line for path in (run / ITEMS, *sorted(run.glob("items-[0-9]*.jsonl"))) for line in _items(path)]
    # Weights that were trained on are measured again, maybe into another file: the time tells which is newer.
    found.update((key, scores) for _, key, scores in sorted(lines, key=lambda line: line[0]))
    return found


def _evals(path: Path) -> Iterator[tuple[ScoreKey, Scores]]:
    from nasbench.evaluation.scores import ScoreKey, Scores

    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    for line, row in enumerate(rows, 2):
        try:
            value, stderr, count = float(row["value"]), float(row["stderr"]), int(row["n"])
            placement = format_placement(parse_placement(row["placement"]))
            key = ScoreKey(row["version"], placement, row["task"], row["detail"], row["dtype"])
            if not math.isfinite(value) or math.isinf(stderr):
                raise ValueError(f"value {row['value']}, stderr {row['stderr']}")
            yield key, Scores(row["metric"], row["higher_is_better"] == "1", value, stderr, count)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            log.warning("%s:%d: left out: %s", path, line, error)


def _items(path: Path) -> Iterator[tuple[float, ScoreKey, Scores]]:
    from nasbench.evaluation.scores import ScoreKey, Scores

    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            measure, about = str(row["measure"]), {"weights": row["weights"]}
            lower = measure.partition(".")[0] in LOWER
            scores = Scores.of(row["values"], "nats" if lower else "accuracy", not lower, about)
            if not math.isfinite(scores.value):
                raise ValueError(f"{measure} is {scores.value}")
            key = ScoreKey(str(row["version"]), str(row["placement"]), measure, ITEMS, "")
            yield float(row.get("time", 0.0)), key, scores
        except (ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s:%d: left out: %s", path, number, error)
