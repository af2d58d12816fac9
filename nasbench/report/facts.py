"""Everything that a report says, computed from the files of a run. Draws nothing, loads no weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nasbench import __version__
from nasbench.checkpoints.resolve import classify, resolve_shape
from nasbench.core.dtypes import dtype_bytes
from nasbench.core.errors import UserError
from nasbench.core.provenance import utc_now
from nasbench.core.sizes import format_size
from nasbench.core.tables import read_table
from nasbench.cost import find_profiles
from nasbench.evaluation.importance import Importance
from nasbench.model.shapes import ModelSpec
from nasbench.report.comparison import Comparison
from nasbench.report.provenance import Source, commands, sources, teacher_source
from nasbench.runs import Run
from nasbench.search.trials import UNIFORM, FrontRow, Target, Trial, latest, read_front, read_trials, unique
from nasbench.search.validation import ValidationRow, mean_error, read_validation
from nasbench.spaces.placement import Placement
from nasbench.store import Row, block_cells, select


@dataclass(frozen=True)
class Missing:
    """A part that the run has no file for yet, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class Point:
    """One point of a front, with what the report says beside it.

    Attributes:
        delta: loss above the full-attention model's on the search split, nats; `delta_test` on the test split.
        speedup: decode tokens/s over the full-attention model's, both predicted.
        measured_tok_s: end to end, NaN where not validated; `measured_utc` when.
    """

    row: FrontRow
    delta: float
    delta_test: float
    speedup: float
    measured_tok_s: float
    measured_utc: str

    @property
    def estimated(self) -> bool:
        return self.row.source == "estimated"


@dataclass(frozen=True)
class TargetFacts:
    """What was searched for one target; `even` has every evenly spread placement, also those that searches found."""

    target: Target
    full: Trial | None
    trials: list[Trial]
    even: list[Trial]
    points: list[Point]

    @property
    def measure(self) -> str:
        """What the front sets against the speed."""
        objective = self.points[0].row.objective if self.points else "kl"
        return "loss, nats a token" if objective in ("loss", "kl") else f"score of {objective}"

    @property
    def hypervolume(self) -> float:
        return self.points[0].row.hypervolume if self.points else math.nan

    @property
    def estimated(self) -> bool:
        return any(trial.source == "estimated" for trial in self.trials)


@dataclass(frozen=True)
class Facts:
    """A report's contents.

    Attributes:
        curves: one decode step of one mixer at one batch, a row for each kind and context: name, title, batch, context,
            us (p50, microseconds), low_us and high_us (p20, p80), cache_bytes (of the layer, by formula), estimated.
        training: mean logged loss of the layers, a row for each stage, name ("" is the whole network) and tokens: loss.
    """

    run: Run
    shape: ModelSpec
    teacher: str
    created_utc: str
    version: str
    targets: list[TargetFacts]
    importance: list[Importance]
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


def kind_title(shape: ModelSpec, name: str) -> str:
    """What a layer name is called in this model: the kind's title and its arguments."""
    config = shape.mixer(name)
    return f"{config.title} {config.args.replace('x', '×')}".strip()


def collect(run: Run, db: Path | None = None) -> Facts:
    """Reads the run's files and the profile rows of its targets.

    Raises:
        UserError: a damaged file, named with line and column. Files that are not there yet are listed in `missing`.
    """
    missing: list[Missing] = []
    shape = resolve_shape(run.spec.model)
    folder = str(run.path)
    trials, fronts = read_trials(run.trials), read_front(run.front)
    everything = read_validation(run.validation)
    # Placements at a context that no cost model predicts stand among the speeds of the comparison.
    validation = [row for row in everything if row.predicted_tok_s > 0 and row.measured_tok_s > 0]
    original = run.spec.space.original
    targets = [_target(target, trials, fronts, validation, original) for target in _targets(trials)]
    if not any(found.points for found in targets):
        missing.append(Missing("placements", f"nasbench search {folder} --strategy beam --full-attention 4,8"))
    rows, curves = _profile(targets, shape, run, db)
    if curves.empty:
        missing.append(Missing("speed and cache of every layer kind", f"nasbench profile --model {run.spec.model}"))
    if not validation:
        missing.append(Missing("predicted against measured speed", f"nasbench validate {folder}"))
    importance = read_table(run.path / "importance.csv", Importance, exact=False)
    if not importance:
        missing.append(Missing("layer importance", f"nasbench search {folder} --strategy beam --full-attention 4"))
    comparison = Comparison(run, shape)
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
        curves=curves,
        validation=validation,
        training=training,
        comparison=comparison,
        sources=sources(trials, rows, validation),
        commands=commands(run, trials),
        missing=missing,
    )


def _targets(trials: Sequence[Trial]) -> list[Target]:
    """Every target, that of the latest trial first."""
    return list(dict.fromkeys(trial.target for trial in reversed(trials)))


def _target(
    target: Target,
    trials: Sequence[Trial],
    fronts: Sequence[FrontRow],
    validation: Sequence[ValidationRow],
    original: Placement,
) -> TargetFacts:
    mine = latest(trials, target)
    mine = [trial for trial in mine if trial.scoring == mine[-1].scoring]
    full = next((trial for trial in mine if trial.layers == original), None)
    measured = {
        row.placement: row
        for row in validation
        if (row.device, row.context, row.batch, row.dtype or target.dtype) == astuple(target)
    }
    full_row = next((row for row in fronts if row.target == target and row.layers == original), None)
    points = []
    for row in sorted((row for row in fronts if row.target == target), key=lambda row: row.rank):
        seen = measured.get(row.placement)
        points.append(
            Point(
                row,
                row.loss - full.loss if full else math.nan,
                row.loss_test - full_row.loss_test if full_row else math.nan,
                row.decode_tok_s / full.decode_tok_s if full else math.nan,
                seen.measured_tok_s if seen else math.nan,
                seen.measured_utc if seen else "",
            )
        )
    even = [trial for trial in mine if trial.strategy == UNIFORM]
    return TargetFacts(target, full, unique(mine), even, points)


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


def _profile(
    targets: Sequence[TargetFacts], shape: ModelSpec, run: Run, db: Path | None
) -> tuple[list[Row], pd.DataFrame]:
    """Rows of the model on the main target's device, and the decode curves at the target's batch (or the nearest)."""
    if not targets:
        return [], pd.DataFrame()
    target = targets[0].target
    try:
        rows = find_profiles(target.device, db)
    except UserError:
        if db is not None:
            raise
        return [], pd.DataFrame()
    rows = [row for row in rows if row.hidden_size in (0, shape.hidden_size) and row.dtype == target.dtype]
    return rows, pd.DataFrame([point for name in run.spec.space.names for point in _curve(name, rows, shape, target)])


def _curve(name: str, rows: Sequence[Row], shape: ModelSpec, target: Target) -> list[dict[str, Any]]:
    config = shape.mixer(name)
    own = select(rows, **block_cells(shape, config.kind, config.args), mode="decode", status="ok")
    if not own:
        return []
    batch = min({row.batch for row in own}, key=lambda size: (abs(size - target.batch), size))
    fastest: dict[int, Row] = {}
    for row in sorted((row for row in own if row.batch == batch), key=lambda row: row.p50_us or math.inf):
        fastest.setdefault(row.context, row)
    return [
        {"name": name, "title": kind_title(shape, name), "batch": batch, "context": context, "us": row.p50_us,
         "low_us": row.p20_us, "high_us": row.p80_us, "estimated": row.source == "estimated",
         "cache_bytes": config.cache_bytes(batch, context, dtype_bytes(target.dtype))}
        for context, row in sorted(fastest.items())
    ]  # fmt: skip


def target_words(target: Target) -> str:
    """`nvidia-h200, context 8k, batch 4, bf16`."""
    return f"{target.device}, context {format_size(target.context)}, batch {target.batch}, {target.dtype}"
