"""runs/NAME/evals.csv: scores that were measured once and are not measured again."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from nasbench.core.errors import UserError
from nasbench.core.files import atomic_path, machine_errors
from nasbench.evaluation.score import Score
from nasbench.spaces.placement import format_placement, parse_placement

COLUMNS = (
    "placement", "task", "detail", "version", "dtype", "metric", "value", "stderr", "n", "higher_is_better",
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What a score belongs to.

    Attributes:
        placement: canonical string.
        task: label, e.g. `retrieval@512`.
        detail: everything else that the score depends on, e.g. which held-out text.
        version: of the supernet's weights.
        dtype: that the model was run in.
    """

    placement: str
    task: str
    detail: str
    version: str
    dtype: str


class EvalsFile:
    """The scores of a run. Several processes may add: a merge reads the file under a lock and replaces it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[Key, Score] = read_evals(path) if path.is_file() else {}

    def get(self, key: Key) -> Score | None:
        return self.scores.get(key)

    def merge(self, new: dict[Key, Score]) -> None:
        """Adds scores and writes the file, with what others added meanwhile. Raises MachineError."""
        if not new:
            return
        with machine_errors(f"writing {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                known = read_evals(self.path) if self.path.is_file() else {}
                self.scores = {**known, **new}
                _write(self.path, self.scores.items())


def _write(path: Path, items: Iterable[tuple[Key, Score]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key, score in sorted(items, key=lambda item: tuple(vars(item[0]).values())):
            numbers = (repr(score.value), repr(score.stderr), score.n, int(score.higher_is_better))
            writer.writerow((key.placement, key.task, key.detail, key.version, key.dtype, score.metric, *numbers))


def read_evals(path: Path) -> dict[Key, Score]:
    """Every row of an evals.csv. Raises UserError with file, line and column for a bad cell."""
    scores: dict[Key, Score] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if tuple(header) != COLUMNS:
                raise UserError(f"{path}:1: the header must be {','.join(COLUMNS)}")
            for cells in reader:
                key, score = _parse(cells, f"{path}:{reader.line_num}")
                scores[key] = score
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    return scores


def _parse(cells: list[str], place: str) -> tuple[Key, Score]:
    if len(cells) != len(COLUMNS):
        raise UserError(f"{place}: {len(cells)} cells, expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
    row = dict(zip(COLUMNS, cells, strict=True))

    def number(column: str, least: float = -math.inf, nan: bool = False) -> float:
        try:
            value = float(row[column])
        except ValueError:
            value = math.inf
        if math.isinf(value) or value < least or (math.isnan(value) and not nan):
            raise UserError(f"{place}: column {column}: bad number {row[column]!r}")
        return value

    try:
        placement = format_placement(parse_placement(row["placement"]))
    except UserError as error:
        raise UserError(f"{place}: column placement: {error}") from None
    if row["higher_is_better"] not in ("0", "1"):
        raise UserError(f"{place}: column higher_is_better: {row['higher_is_better']!r} is neither 0 nor 1")
    if not row["n"].isdecimal() or int(row["n"]) < 1:
        raise UserError(f"{place}: column n: bad count {row['n']!r}")
    score = Score(
        task=row["task"],
        metric=row["metric"],
        value=number("value"),
        stderr=number("stderr", least=0.0, nan=True) if row["stderr"] != "nan" else math.nan,
        n=int(row["n"]),
        higher_is_better=row["higher_is_better"] == "1",
    )
    return Key(placement, row["task"], row["detail"], row["version"], row["dtype"]), score
