"""What a search of a run is given, checked before anything is loaded, and what it would do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import unknown
from nasbench.core.sizes import parse_size
from nasbench.cost import CostModel, check_context, load_cost_model
from nasbench.runs import Run
from nasbench.search.limits import METRICS, parse_limit
from nasbench.search.objective import parse_goal, parse_objective
from nasbench.search.run_target import run_db, run_target
from nasbench.search.session import Options
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import Target, read_trials


@dataclass(frozen=True)
class SearchInputs:
    """A search before it runs.

    Attributes:
        costs: of the target's device and data type, from the databases `db`.
        search_tokens, test_tokens: held-out tokens that score, and others for what was found, None for none.
    """

    run: Run
    strategy: str
    objective: str
    options: Options
    target: Target
    costs: CostModel
    db: Path | None
    search_tokens: int
    test_tokens: int | None

    @classmethod
    def of(
        cls,
        run: Path,
        strategy: str,
        *,
        objective: str,
        most: Sequence[str],
        least: Sequence[str],
        profile: str,
        context: str,
        batch: str,
        dtype: str,
        search_tokens: str,
        test_tokens: str,
        device: str,
        db: Path | None,
        **options: Any,
    ) -> SearchInputs:
        """The arguments of `nasbench.api.search`, sizes as texts. It loads no weights and writes nothing.

        Raises UserError for unknown strategies, objectives and options, and for points without rows.
        """
        opened = Run.open(run)
        if options.get("worker"):
            strategy, test_tokens = "optuna", "0"
        STRATEGIES[strategy]  # Unknown names are told before anything is loaded.
        if objective.partition("@")[0] not in METRICS:
            parse_objective(objective)
        for name in options:
            if name not in (known := [each.name for each in fields(Options)]):
                raise unknown("search option", name, known)
        chosen = Options(**options)
        chosen.check(opened.spec.space)
        scored, held_out = parse_size(search_tokens), None if test_tokens == "0" else parse_size(test_tokens)
        shape, place = resolve_shape(opened.spec.model), run_db(opened, db)
        target = run_target(opened, shape, place, device, profile, context, batch, dtype)
        check_context(shape, target.context)
        costs = load_cost_model(target.device, shape, target.dtype, place)
        parse_goal(objective, target, place)
        limits = [parse_limit(text, True, target, place) for text in most]
        limits += [parse_limit(text, False, target, place) for text in least]
        chosen = replace(chosen, limits=tuple(limits))
        return cls(opened, strategy, objective, chosen, target, costs, place, scored, held_out)

    def plan(self) -> dict[str, Any]:
        """What the search would do, in words and numbers; seconds by the run's earlier trials, None without any."""
        took = [trial.seconds for trial in read_trials(self.run.trials) if trial.seconds > 0]
        seconds = self.options.seconds or (self.options.evaluations * statistics.median(took) if took else None)
        return {
            "run": str(self.run.path),
            "strategy": self.strategy,
            "objective": self.objective,
            "target": str(self.target),
            "full_attention": list(self.options.full_attention),
            "limits": list(map(str, self.options.limits)),
            "evaluations": self.options.evaluations,
            "search_tokens": self.search_tokens,
            "test_tokens": self.test_tokens or 0,
            "seconds": seconds,
        }
