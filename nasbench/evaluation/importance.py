"""Layer importance: what replacing one layer alone costs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError
from nasbench.core.files import atomic_path

if TYPE_CHECKING:
    from nasbench.evaluation.evaluator import Evaluator, Progress


@dataclass(frozen=True)
class Importance:
    """One layer replaced by one alternative, everything else full attention.

    Attributes:
        layer: 0-based.
        name: the alternative, e.g. "J".
        loss_increase: held-out loss above the full-attention model's, nats a token.
        loss_stderr: standard error of the replaced model's loss.
        kl: KL to the full-attention model, nats a token: what moved, also where the loss does not show it.
    """

    layer: int
    name: str
    loss_increase: float
    loss_stderr: float
    kl: float


def layer_importance(
    evaluator: Evaluator, names: Sequence[str] | None, progress: Progress | None = None
) -> list[Importance]:
    """Measures every layer with every alternative (or `names`), on split "search", and writes importance.csv."""
    space = evaluator.supernet.space
    singles = [
        (layer, name, (*space.original[:layer], name, *space.original[layer + 1 :]))
        for layer in range(space.num_layers)
        for name in space.fillers(layer)
        if names is None or name in names
    ]
    scores = evaluator.measure([space.original, *(placement for _, _, placement in singles)], "search", progress)
    base = scores[0]["loss"].value
    rows = [
        Importance(layer, name, score["loss"].value - base, score["loss"].stderr, score["kl"].value)
        for (layer, name, _), score in zip(singles, scores[1:], strict=True)
    ]
    write_importance(importance_path(evaluator.run.path), rows)
    return rows


def importance_path(run: Path) -> Path:
    """Where a run keeps its layer importance."""
    return run / "importance.csv"


def write_importance(path: Path, rows: Sequence[Importance]) -> None:
    """Writes the rows atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Importance)])
        for row in rows:
            writer.writerow([row.layer, row.name, *(f"{x:.6g}" for x in (row.loss_increase, row.loss_stderr, row.kl))])


def read_importance(path: Path) -> list[Importance]:
    """Reads the rows back. Raises UserError with file, line and column for a bad cell."""
    names = [field.name for field in fields(Importance)]
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if next(reader, []) != names:
            raise UserError(f"{path}:1: the header must be {','.join(names)}")
        for cells in reader:
            place = f"{path}:{reader.line_num}"
            if len(cells) != len(names):
                raise UserError(f"{place}: {len(cells)} cells, expected {len(names)}")
            numbers = []
            for column, cell in zip(names, cells, strict=True):
                try:
                    numbers.append(cell if column == "name" else int(cell) if column == "layer" else float(cell))
                except ValueError:
                    raise UserError(f"{place}: column {column}: bad number {cell!r}") from None
            rows.append(Importance(*numbers))  # type: ignore[arg-type]
    return rows
