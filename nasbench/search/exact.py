"""The exact optimum of an additive model: every layer's score, measured alone, sums to the placement's.

An integer program (HiGHS) with all limits as linear constraints. Without a K it is solved for a row of budgets, from
the least that any placement needs of the first limit to its bound; without limits, of the decode step. Each program
gives its optimum and further placements that differ from it, which the supernet ranks again: what layers cost alone
does not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nasbench.core.errors import UserError
from nasbench.search.limited import LimitedProgram
from nasbench.search.limits import Limit, Workload
from nasbench.search.program import Floats, Row, Solution
from nasbench.search.session import STRATEGIES, Session
from nasbench.spaces.placement import Placement

NAME = "exact"
POINTS = 20
"""Budgets of a search without K."""
POOL = 6
"""Placements of one program, the optimum included ..."""
DISTANCE = 2
"""... in how many layers each differs from those before it, at least."""


def budgets(limited: LimitedProgram, scores: Floats, extra: list[Row], points: int = POINTS) -> list[Solution]:
    """The optimum at each budget of the first limit: the front of the additive model, each point once."""
    most = limited.solve(scores, extra=extra)
    if most is None or len(limited.rows[0]) != 1:  # a batch of max has a bound for each batch: its own is the budget
        return [most] if most else []
    row = limited.rows[0][0][0]
    least = limited.solve(row.coefficients, extra=extra) or most
    low, high = (float(row.coefficients @ _chosen(limited, one.placement)) for one in (least, most))
    found: dict[Placement, Solution] = {}
    start = None
    for bound in np.linspace(low, high, points)[:-1]:
        cut = replace(row, bound=float(bound) + 1e-9 * abs(bound))
        if solution := limited.solve(scores, extra=[*extra, cut], begin=start):  # what fits a budget fits a larger one
            found.setdefault(solution.placement, solution)
            start = solution.placement
    found.setdefault(most.placement, most)
    return list(found.values())


def _chosen(limited: LimitedProgram, placement: Placement) -> Floats:
    return np.array([float(placement[layer] == name) for layer, name in limited.program.keys])


def pool(limited: LimitedProgram, scores: Floats, extra: list[Row], count: int | None, size: int) -> Iterator[Solution]:
    """The optimum, and the best placements that differ from all before it in DISTANCE layers."""
    apart: list[Row] = []
    for _ in range(size):
        found = limited.solve(scores, count, [*extra, *apart])
        if found is None:
            return
        yield found
        apart.append(limited.program.apart(found.placement, DISTANCE))


def exact(search: Session) -> None:
    """The strategy. Raises UserError where nothing keeps to the limits on tasks by the additive model."""
    space, objective, options = search.space, search.objective, search.options
    increases = {**search.importance, **objective.importance(search.faster, by_score=True)}
    increases |= dict.fromkeys(enumerate(space.original), 0.0)
    choices = [tuple(name for name in names if (i, name) in increases) for i, names in enumerate(space.choices)]
    limits = search.cost_limits
    swept = not limits and not options.full_attention
    if swept:
        at = objective.target
        limits = [Limit("tpot_ms", True, _step_ms(search), Workload(at.device, at.context, at.batch))]
    limited = LimitedProgram(choices, space.original, objective.costs, limits)
    scores = limited.program.vector(increases)
    extra = _task_rows(search, limited)
    solved: list[list[Solution]] = []
    for count in options.full_attention:
        size = max(1, min(POOL, options.evaluations // len(options.full_attention)))
        solved.append(list(pool(limited, scores, extra, count, size)))
    if not options.full_attention:
        ends = budgets(limited, scores, extra, min(POINTS, options.evaluations))
        within = [] if swept else list(pool(limited, scores, extra, None, POOL))
        solved += [within, *([one] for one in reversed(ends))]
    found = [solution for own in solved for solution in own]
    if not found:
        raise UserError("no placement keeps to all limits, by what the layers cost alone: loosen those on tasks")
    gap = max(one.score - one.least for one in found)
    search.notes.append(
        f"exact: {len(found)} integer programs solved, each proved optimal within {max(gap, 0.0):.1e} of its score"
    )
    # The optima first: they may be all that the budget lasts for.
    order = [own[rank] for rank in range(POOL) for own in solved if rank < len(own)]
    search.evaluate([one.placement for one in order], NAME)


def _step_ms(search: Session) -> float:
    return search.objective.speed(search.space.original).step_ms


def _task_rows(search: Session, limited: LimitedProgram) -> list[Row]:
    """Limits on tasks, of which the layers' changes sum as well."""
    rows = []
    for limit in search.options.limits:
        if limit.workload is None:
            base, changes = search.objective.task_changes(limit, search.faster)
            sign = 1.0 if limit.most else -1.0
            changes |= dict.fromkeys(enumerate(search.space.original), 0.0)
            coefficients = sign * limited.program.vector(changes)
            rows.append(Row(coefficients, sign * (limit.bound - base)))
    return rows


STRATEGIES.register(NAME, exact)
