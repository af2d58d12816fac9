"""The integer program of a search with its limits on costs, and whether anything keeps to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nasbench.core.errors import UserError
from nasbench.search.limits import Costs, Limit, pieces
from nasbench.search.program import Floats, Program, Row, Solution
from nasbench.spaces.placement import Placement, format_placement

if TYPE_CHECKING:
    from nasbench.search.session import Session

CUTS = 50
"""Solutions that may turn out to miss a limit that is no sum over the layers, before the search gives up."""


class LimitedProgram:
    """Solves for placements within limits.

    Args:
        choices: names per layer that may be used.
        original: the model's own placement.
        limits: on costs.

    Attributes:
        rows: every limit's alternatives, each of several rows; a caller may add others, as of scores.
    """

    def __init__(
        self, choices: Sequence[Sequence[str]], original: Placement, costs: Costs | None, limits: Sequence[Limit]
    ) -> None:
        self.program = Program(choices)
        self.costs, self.limits, self.original = costs, limits, original
        self._pieces = [pieces(costs, limit) for limit in limits if costs is not None]
        self.rows: list[list[list[Row]]] = []
        for alternatives in self._pieces:
            lines = [[self.program.linear(piece, original) for piece in own] for own in alternatives]
            # A batch at which no placement is measured is no alternative.
            whole = [[row for rows in own for row in rows or ()] for own in lines if all(rows for rows in own)]
            self.rows.append(whole)

    def solve(
        self,
        scores: Floats,
        count: int | None = None,
        extra: Sequence[Row] = (),
        elastic: bool = False,
        begin: Placement | None = None,
    ) -> Solution | None:
        """The placement with the least sum of scores within the limits; None where there is none.

        Costs that are no sum over the layers, as the time of a prompt whose kernels the host launches too late, are
        linear around each solution that misses them.
        """
        cuts = list(extra)
        for _ in range(CUTS):
            found = self.program.solve(scores, [*self.rows, *([[row]] for row in cuts)], count, elastic, begin)
            if found is None or elastic:
                return found
            missed = [i for i, limit in enumerate(self.limits) if self.excess(limit, found.placement)]
            if not missed:
                return found
            cuts.append(self.program.apart(found.placement, 1))
            for i in missed:
                if len(self._pieces[i]) == 1:
                    cuts += [
                        row for piece in self._pieces[i][0] for row in self.program.tangent(piece, found.placement)
                    ]
        return None

    def excess(self, limit: Limit, placement: Placement) -> float:
        """By how much of its bound a placement misses a limit."""
        assert self.costs is not None
        assert limit.workload is not None
        return limit.excess(self.costs.value(limit.metric, limit.workload, placement))

    def least(self, number: int, count: int | None = None) -> Placement | None:
        """The placement that is the farthest within one limit, the others left out; None for a batch of max."""
        if len(self.rows[number]) != 1:
            return None
        found = self.program.solve(self.rows[number][0][0].coefficients, (), count)
        return found.placement if found else None


def check_limits(search: Session, count: int | None) -> Placement:
    """The placement of K full-attention layers (of any number: None) that keeps to all limits on costs and the most
    layers as they are. Raises UserError naming the limits that bind and the nearest placement."""
    space, limits = search.space, search.cost_limits
    if not limits:
        return space.original
    choices = [tuple(dict.fromkeys((own, *search.replacements(i)))) for i, own in enumerate(space.original)]
    limited = LimitedProgram(choices, space.original, search.objective.costs, limits)
    changed = np.array([float(not space.is_original(*key)) / space.num_layers for key in limited.program.keys])
    if found := limited.solve(changed, count):
        return found.placement
    of_k = "" if count is None else f" with {count} full-attention layers"
    options = "; ".join(map(str, limits))
    free = limited.solve(changed) if count is not None else None
    if free:
        return _refuse(f"no placement{of_k} keeps to {options}: the nearest one that does is", free.placement)
    near = limited.solve(changed, count, elastic=True)
    if near is None:
        raise UserError(f"no placement{of_k} keeps to {options}: no measured batch fits")
    told = []
    for number, limit in enumerate(limits):
        if excess := limited.excess(limit, near.placement):
            value = _value(search, limit, near.placement)
            least = limited.least(number, count)
            alone = f", and {_value(search, limit, least):g} is the nearest that any has" if least else ""
            told.append(f"{limit} binds: it has {value:g}, {excess:.1%} beyond it{alone}")
    return _refuse(f"no placement{of_k} keeps to {options}: {'; '.join(told)}; the nearest one is", near.placement)


def _value(search: Session, limit: Limit, placement: Placement) -> float:
    return dict(search.values(placement))[limit]


def _refuse(reason: str, placement: Placement) -> Placement:
    raise UserError(f"{reason} {format_placement(placement)!r}")
