"""The exact optimum of an additive model: every layer's loss increase, measured alone, sums to the placement's.

An integer program (HiGHS): one name per layer, exactly K layers of full attention, or a decode step no longer than a
budget. The answer is exact for the model, not for the world: it is then evaluated like any other placement.
"""

from __future__ import annotations

import math

from nasbench.core.errors import MachineError, UserError
from nasbench.search.session import STRATEGIES, Search
from nasbench.spaces.placement import Placement, kind_of
from nasbench.spaces.space import Space

NAME = "exact"


def solve(
    space: Space,
    increases: dict[tuple[int, str], float],
    count: int | None = None,
    layer_ms: dict[str, float] | None = None,
    budget_ms: float = math.inf,
) -> Placement | None:
    """The placement with the least sum of loss increases; None if no placement satisfies the constraints.

    Args:
        increases: of each (layer, name); names that are missing are not used, full attention is 0.
        count: exact number of full-attention layers.
        layer_ms: time of one layer of each name; with `budget_ms`, the longest sum over the layers.
    """
    import highspy

    program = highspy.Highs()
    program.setOptionValue("output_flag", False)
    chosen = {
        (layer, name): program.addBinary(obj=increases.get((layer, name), 0.0))
        for layer, names in enumerate(space.choices)
        for name in names
        if kind_of(name) == "A" or (layer, name) in increases
    }
    for layer in range(space.num_layers):
        program.addConstr(sum(x for (at, _), x in chosen.items() if at == layer) == 1)
    if count is not None:
        program.addConstr(sum(x for (_, name), x in chosen.items() if kind_of(name) == "A") == count)
    if layer_ms is not None and math.isfinite(budget_ms):
        program.addConstr(sum(layer_ms[name] * x for (_, name), x in chosen.items()) <= budget_ms)
    program.minimize()
    status = program.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        raise MachineError(f"the integer program was not solved: {program.modelStatusToString(status)}")
    values = program.getSolution().col_value
    picked = {layer: name for (layer, name), x in chosen.items() if values[x.index] > 0.5}
    return tuple(picked[layer] for layer in range(space.num_layers))


def layer_times(search: Search) -> tuple[dict[str, float], float]:
    """(milliseconds of one layer of each name relative to full attention, step of the full-attention model)."""
    layers, space = search.space.num_layers, search.space
    full_ms = search.objective.speed(space.original).step_ms
    times = {name: (search.objective.speed((name,) * layers).step_ms - full_ms) / layers for name in space.names}
    return times, full_ms


def exact(search: Search) -> None:
    """The strategy. Raises UserError if neither K nor a step time was asked for, or nothing satisfies them."""
    options = search.options
    if not options.full_attention and not options.step_ms:
        raise UserError("the exact strategy needs --full-attention K[,K...] or a decode step's limit: --step-ms T")
    increases = dict(search.importance)
    times, full_ms = layer_times(search) if options.step_ms else (None, 0.0)
    budget_ms = options.step_ms - full_ms if options.step_ms else math.inf
    for count in options.full_attention or (None,):
        placement = solve(search.space, increases, count, times, budget_ms)
        if placement is None:
            limit = f" and {count} full-attention layers" if count is not None else ""
            least = full_ms + search.space.num_layers * min((times or {}).values(), default=0.0)
            raise UserError(
                f"no placement has a decode step of {options.step_ms:g} ms{limit}: "
                f"the model takes {least:.4g} to {full_ms:.4g} ms"
            )
        search.evaluate([placement], NAME)


STRATEGIES.register(NAME, exact)
