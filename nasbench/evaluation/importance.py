"""Layer importance: what replacing one layer alone costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nasbench.core.tables import write_table
from nasbench.evaluation.evaluator import Evaluator, Progress


@dataclass(frozen=True)
class Importance:
    """One layer replaced by one alternative, everything else the original.

    Attributes:
        layer: 0-based.
        name: the alternative, e.g. "J".
        loss_increase: held-out loss above the original model's, nats a token.
        loss_stderr: standard error of the replaced model's loss.
        kl: KL to the original model, nats a token: what moved, also where the loss does not show it.
    """

    layer: int
    name: str
    loss_increase: float
    loss_stderr: float
    kl: float


def layer_importance(
    evaluator: Evaluator, names: Sequence[str] | None = None, progress: Progress = lambda done, total: None
) -> list[Importance]:
    """Measures every layer with every alternative (or `names`), on split "search", and writes importance.csv. Sorted by
    layer, then name."""
    space = evaluator.supernet.space
    singles = [
        (layer, name, (*space.original[:layer], name, *space.original[layer + 1 :]))
        for layer in range(space.num_layers)
        for name in space.alternatives(layer)
        if names is None or name in names
    ]
    scores = evaluator.measure([space.original, *(placement for _, _, placement in singles)], "search", progress)
    base = scores[0]["loss"].value
    rows = [
        Importance(layer, name, score["loss"].value - base, score["loss"].stderr, score["kl"].value)
        for (layer, name, _), score in zip(singles, scores[1:], strict=True)
    ]
    write_table(importance_path(evaluator.run.path), rows, Importance, digits=6)
    return rows


def importance_path(run: Path) -> Path:
    """Where a run keeps its layer importance."""
    return run / "importance.csv"
