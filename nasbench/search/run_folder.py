"""A search of a run folder: what the command line and the quickstart call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size
from nasbench.cost import CostModel, stale_warning
from nasbench.runs import Run
from nasbench.search import strategies
from nasbench.search.limits import Costs
from nasbench.search.objective import RunObjective, model_speed
from nasbench.search.racing import ERROR
from nasbench.search.session import Comparison, Options, Progress, Session, compare, run_search
from nasbench.search.trials import FrontRow, Target, Trial, best_of, front_rows, read_trials, write_front
from nasbench.search.trust import Trust, trust
from nasbench.search.validation import ValidationRow
from nasbench.spaces.placement import Placement, format_placement
from nasbench.store import Row

if TYPE_CHECKING:
    from nasbench.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        target: device, context, batch and dtype of the speeds.
        comparisons: of every wanted K.
        front: over all trials of the target that keep to the limits.
        best: the trial with the lowest score within the limits; None where none is within those on tasks.
        limits: what the best one costs where there are limits.
        notes: what the strategy says of its answer.
        trust: how sure the comparisons and the order are.
        measured: finalists, measured end to end.
    """

    target: Target
    comparisons: list[Comparison]
    front: list[FrontRow]
    best: Trial | None
    limits: list[Kept]
    notes: list[str]
    trust: Trust
    measured: list[ValidationRow] = field(default_factory=list)

    def finalists(self, most: int) -> list[Placement]:
        """The best placement, the best of every K, and the front thinned evenly, at most so many."""
        best = [self.best] if self.best else []
        searched = [pair.searched for pair in sorted(self.comparisons, key=lambda pair: pair.searched.score)]
        last, steps = len(self.front) - 1, max(1, most - 1)
        spread = [self.front[i * last // steps] for i in range(most) if self.front]
        return list(dict.fromkeys(trial.layers for trial in (*best, *searched, *spread)))[:most]


@dataclass(frozen=True)
class Kept:
    """A limit on a cost, and what the best placement costs there."""

    limit: str
    value: float


def choose_dtype(rows: Sequence[Row], asked: str, device: str) -> str:
    """The dtype of the speeds: the one asked for, else bf16 where the device has rows of it, else the one it has.

    Raises UserError where the device has no decode rows (of that dtype).
    """
    known = sorted({row.dtype for row in rows if row.mode == "decode" and row.status == "ok"})
    if asked and asked in known:
        return asked
    if not known or asked:
        raise UserError(
            f"no decode rows of dtype {asked or 'any'} on {device} (there are: {', '.join(known) or 'none'}): "
            "measure them there with `nasbench profile`"
        )
    return "bf16" if "bf16" in known else known[0]


def search_run(
    run: Run,
    evaluator: Evaluator,
    cost: CostModel,
    target: Target,
    strategy: str,
    options: Options,
    *,
    objective: str = "kl",
    test: bool = True,
    db: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Runs one strategy, adds its trials to trials.csv and writes the target's front, limits or not, to front.csv.

    Args:
        cost: of the target's device and data type.
        db: where the profiles of the limits' devices are.
        objective: what the search minimises, see nasbench.search.objective.
        test: score the front, and the compared placements, on the test split as well (kept in the score store).

    Raises:
        UserError: unknown strategy, bad options, rows that are missing for the target.
    """
    strategies.STRATEGIES[strategy]
    # Missing rows are the user's to fix: say so before the first loss is measured.
    space = evaluator.supernet.space
    whole = [cost.decode(space.homogeneous(name), target.context, target.batch) for name in space.names]
    stale = sorted({block for each in whole for block in each.stale})
    costs = Costs(cost.shape, cost, db)
    costs.check(options.limits, space)
    world = RunObjective(target, evaluator, model_speed(cost, target), objective, progress, costs, options.limits)
    search = Session(run.path, world, options, progress)
    run_search(search, strategy)
    if stale:
        search.notes.append(stale_warning(stale, cost.device, cost.shape.name))
    raced, stopped, full_rows, read = map(int, world.raced)
    if stopped:
        search.notes.append(
            f"{stopped} of {raced} placements stopped early: {full_rows / read:.1f}x fewer rows of text; the chance "
            f"that one of them was among the best of its round is at most {ERROR:.1%}"
        )
    layers = evaluator.layers
    if layers.computed:
        search.notes.append(
            f"{layers.computed:,} layer evaluations instead of {layers.asked:,} "
            f"({layers.asked / layers.computed:.1f}x fewer): placements share the layers that they begin with"
        )
    every, trials = search.trials(), search.feasible()
    comparisons = compare(trials, options.full_attention or sorted({trial.k for trial in trials}))
    best = best_of(trials) if trials else None
    if test:
        fast = [row.layers for row in front_rows(trials, world.reference)]
        pairs = [trial.layers for pair in comparisons for trial in (pair.searched, pair.uniform)]
        evaluator.measure(
            list(dict.fromkeys([*fast, *pairs])), "test", lambda done, total: progress("test split", done, total)
        )
    front = front_rows(every, world.reference, lambda layers: held_out_scores(evaluator, layers))
    front = [replace(row, **search.kept(row.layers)) for row in front]
    write_front(run.front, target, front)
    within = front_rows(trials, world.reference, lambda layers: held_out_scores(evaluator, layers))
    kept = [Kept(str(limit), value) for limit, value in search.values(best.layers)] if best else []
    known = trust(evaluator, world, comparisons, trials, read_trials(run.trials, evaluator.store))
    return Outcome(target, comparisons, within if options.limits else front, best, kept, search.notes, known)


def held_out_scores(evaluator: Evaluator, placement: Placement) -> tuple[float, float, float]:
    """(test loss, its standard error, retrieval accuracy at the longest length) as far as they have been measured."""
    loss, stderr, retrieval, items, length = math.nan, math.nan, math.nan, 0, 0
    found = evaluator.store.find(placement=format_placement(placement), weights=evaluator.supernet.version)
    for key, score in found.items():
        if key.task == "loss" and key.settings.startswith("test/") and score.n >= items:
            loss, stderr, items = score.value, score.stderr, score.n
        name, _, at = key.task.partition(":")[0].partition("@")
        if name == "retrieval" and "/test/" in key.settings and parse_size(at) >= length:
            retrieval, length = score.value, parse_size(at)
    return loss, stderr, retrieval
