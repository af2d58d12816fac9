"""The exact optimum of an additive model: every layer's loss increase, measured alone, sums to the placement's.

An integer program (HiGHS): one name per layer, exactly K layers of full attention, or a decode step no longer than a
budget. The answer is exact for the model, not for the world: it is then evaluated like any other placement.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nasbench.core.errors import MachineError, UserError
from nasbench.search.session import STRATEGIES, Session
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import Space, is_full

NAME = "exact"


def solve(
    space: Space,
    increases: dict[tuple[int, str], float],
    count: int | None = None,
    layer_ms: dict[tuple[int, str], float] | None = None,
    budget_ms: float = math.inf,
) -> Placement | None:
    """The placement with the least sum of loss increases; None if no placement satisfies the constraints.

    Args:
        increases: of each (layer, name); names that are missing are not used, full attention is 0.
        count: exact number of full-attention layers.
        layer_ms: time of each (layer, name); with `budget_ms`, the longest sum over the layers.
    """
    import highspy

    with _stdout_to_stderr():
        program = highspy.Highs()
    program.setOptionValue("output_flag", False)
    chosen = {
        (layer, name): program.addBinary(obj=increases.get((layer, name), 0.0))
        for layer, names in enumerate(space.choices)
        for name in names
        if is_full(name) or (layer, name) in increases
    }
    for layer in range(space.num_layers):
        program.addConstr(sum(x for (at, _), x in chosen.items() if at == layer) == 1)
    if count is not None:
        program.addConstr(sum(x for (_, name), x in chosen.items() if is_full(name)) == count)
    if layer_ms is not None and math.isfinite(budget_ms):
        program.addConstr(sum(layer_ms[key] * x for key, x in chosen.items()) <= budget_ms)
    program.minimize()
    status = program.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        raise MachineError(f"the integer program was not solved: {program.modelStatusToString(status)}")
    values = program.getSolution().col_value
    picked = {layer: name for (layer, name), x in chosen.items() if values[x.index] > 0.5}
    return tuple(picked[layer] for layer in range(space.num_layers))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS prints its banner on the process's standard output, before it can be told not to."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def layer_times(search: Session) -> tuple[dict[tuple[int, str], float], float]:
    """(milliseconds that each name adds to a step in each layer, step of the model itself)."""
    space, speed = search.space, search.objective.speed
    full_ms = speed(space.original).step_ms
    groups: dict[tuple[str, str], list[int]] = {}
    for layer, names in enumerate(space.choices):
        for name in names:
            groups.setdefault((names[0], name), []).append(layer)
    times = {}
    for (_, name), layers in groups.items():
        changed = tuple(name if i in layers else own for i, own in enumerate(space.original))
        times.update(dict.fromkeys(((i, name) for i in layers), (speed(changed).step_ms - full_ms) / len(layers)))
    return times, full_ms


def exact(search: Session) -> None:
    """The strategy. Raises UserError if neither K nor a step time was asked for, or nothing satisfies them."""
    options = search.options
    if not options.full_attention and not options.step_ms:
        raise UserError("the exact strategy needs --full-attention K[,K...] or a decode step's limit: --step-ms T")
    increases = {**search.importance, **search.objective.importance(search.faster, by_score=True)}
    times, full_ms = layer_times(search) if options.step_ms else (None, 0.0)
    budget_ms = options.step_ms - full_ms if options.step_ms else math.inf
    for count in options.full_attention or (None,):
        placement = solve(search.space, increases, count, times, budget_ms)
        if placement is None:
            limit = f" and {count} full-attention layers" if count is not None else ""
            least = full_ms + sum(
                min((times or {}).get((i, n), 0.0) for n in c) for i, c in enumerate(search.space.choices)
            )
            raise UserError(
                f"no placement has a decode step of {options.step_ms:g} ms{limit}: "
                f"the model takes {least:.4g} to {full_ms:.4g} ms"
            )
        search.evaluate([placement], NAME)


exact.keeps_step_ms = True  # type: ignore[attr-defined]
STRATEGIES.register(NAME, exact)
