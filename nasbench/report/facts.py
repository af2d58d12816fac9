"""Everything that a report says, computed from the files of a run. Draws nothing, loads no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nasbench import __version__
from nasbench.checkpoints.resolve import classify, resolve_shape
from nasbench.core.errors import UserError
from nasbench.core.provenance import utc_now
from nasbench.core.tables import read_table
from nasbench.cost import CostModel
from nasbench.evaluation.importance import Importance
from nasbench.evaluation.scores import ScoreStore
from nasbench.model.shapes import ModelSpec
from nasbench.report.comparison import Comparison
from nasbench.report.provenance import Source, commands, sources, teacher_source
from nasbench.report.speeds import kind_title, layer_curves, profile_rows, roofline_points, whole_models
from nasbench.report.targets import TargetFacts, target_facts
from nasbench.runs import Run
from nasbench.search.trials import read_front
from nasbench.search.validation import ValidationRow, mean_error, read_validation
from nasbench.spaces.placement import format_placement


@dataclass(frozen=True)
class Missing:
    """A part that the run has no file for yet, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class Facts:
    """A report's contents.

    Attributes:
        importance: what each layer costs replaced alone: task, name, layer, value (above the model's, lower is better).
        curves, whole, roofline: see nasbench.report.speeds.
        cost: the cost model of the main target, without rows where nobody profiled its device.
        training: mean logged loss of the layers, a row for each stage, name ("" is the whole network) and tokens: loss.
    """

    run: Run
    shape: ModelSpec
    teacher: str
    created_utc: str
    version: str
    targets: list[TargetFacts]
    importance: pd.DataFrame
    whole: pd.DataFrame
    cost: CostModel | None
    roofline: pd.DataFrame
    curves: pd.DataFrame
    validation: list[ValidationRow]
    training: pd.DataFrame
    comparison: Comparison
    sources: list[Source]
    commands: list[str]
    missing: list[Missing] = field(default_factory=list)

    @property
    def main(self) -> TargetFacts | None:
        """The target of the latest trial, which the report is about first."""
        return self.targets[0] if self.targets else None

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """(name, title) of every layer kind of the space, full attention first."""
        return [(name, self.title(name)) for name in self.run.spec.space.names]

    def title(self, name: str) -> str:
        """`W` -> `sliding window 128`, with the arguments that the name stands for in this model."""
        return kind_title(self.shape, name)

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error of the predicted decode speeds; NaN without validation."""
        return mean_error(self.validation) if self.validation else math.nan


def collect(run: Run, db: Path | None = None) -> Facts:
    """Reads the run's files and the profile rows of its targets.

    Args:
        db: folder or file of profile databases; by default the run's own, else the shipped and the user's.

    Raises:
        UserError: a damaged file, named with line and column. Files that are not there yet are listed in `missing`.
    """
    missing: list[Missing] = []
    db = run.path / "profiles" if db is None and (run.path / "profiles").is_dir() else db
    shape = resolve_shape(run.spec.model)
    folder = str(run.path)
    store = ScoreStore(run.scores)
    fronts, comparison = read_front(run.front), Comparison(run, shape, store)
    trials = comparison.trials
    everything = read_validation(run.validation)
    # Placements at a context that no cost model predicts stand among the speeds of the comparison.
    validation = [row for row in everything if row.predicted_tok_s > 0 and row.measured_tok_s > 0]
    original = run.spec.space.original
    targets = [
        target_facts(target, trials, fronts, validation, original, comparison)
        for target in dict.fromkeys(trial.target for trial in reversed(trials))
    ]
    if not any(found.points for found in targets):
        missing.append(Missing("placements", f"nasbench search {folder} --strategy beam --full-attention 4,8"))
    main = targets[0].target if targets else None
    rows = profile_rows(main, shape, db) if main else []
    curves = layer_curves(run.spec.space.names, rows, shape, main) if main else pd.DataFrame()
    whole, cost = whole_models(targets[0], shape, db) if targets else (pd.DataFrame(), None)
    if curves.empty:
        missing.append(Missing("speed and cache of every layer kind", f"nasbench profile --model {run.spec.model}"))
    if not validation:
        missing.append(Missing("predicted against measured speed", f"nasbench validate {folder}"))
    importance = _importance(run, comparison)
    if importance.empty:
        missing.append(Missing("layer importance", f"nasbench search {folder} --strategy beam --full-attention 4"))
    if not comparison.measured:
        missing.append(Missing("placements compared item by item", f"nasbench eval {folder} --placements auto"))
    training = _training(run.supernet / "losses.csv")
    if training.empty:
        missing.append(Missing("training curves", f"nasbench distill --model {run.spec.model} --out {folder}"))
    return Facts(
        run=run,
        shape=shape,
        teacher=teacher_source(classify(run.spec.model)),
        created_utc=utc_now(),
        version=__version__,
        targets=targets,
        importance=importance,
        whole=whole,
        cost=cost,
        roofline=roofline_points(rows, main.batch if main else 1),
        curves=curves,
        validation=validation,
        training=training,
        comparison=comparison,
        sources=sources(run, trials, rows, validation),
        commands=commands(run, trials),
        missing=missing,
    )


def _training(path: Path) -> pd.DataFrame:
    """The mean over the layers of every logged step. Raises UserError for a damaged file."""
    columns = ["stage", "name", "tokens", "loss"]
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    try:
        rows = pd.read_csv(path, usecols=columns, keep_default_na=False).astype({"tokens": int, "loss": float})
    except ValueError as error:
        raise UserError(f"{path} is not a table of losses: {error}") from None
    return rows.groupby(columns[:3], sort=False)["loss"].mean().reset_index()


def _importance(run: Run, compared: Comparison) -> pd.DataFrame:
    """importance.csv, and of every other task the scores that a search has of placements with one layer replaced."""
    space = run.spec.space
    rows = [
        {"task": task, "name": row.name, "layer": row.layer, "value": value}
        for row in read_table(run.path / "importance.csv", Importance, exact=False)
        for task, value in (("kl", row.kl), ("loss", row.loss_increase))
        if not math.isnan(value)
    ]
    known = {row["task"] for row in rows}
    for layer in range(space.num_layers):
        for name in space.alternatives(layer):
            text = format_placement((*space.original[:layer], name, *space.original[layer + 1 :]))
            rows += [
                {"task": task, "name": name, "layer": layer, "value": value}
                for task, value in compared.while_searching(text).items()
                if task not in known
            ]
    return pd.DataFrame(rows)
