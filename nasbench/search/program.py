"""The integer program of a search: one name a layer, the least sum of scores, every limit linear. HiGHS solves it.

HiGHS proves its answers: no other placement of the space has a smaller sum within the same limits.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.core.errors import MachineError, UserError
from nasbench.search.limits import Piece
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import is_full

Floats = NDArray[np.float64]
SLACK_WEIGHT = 1e3
"""How many layers' scores a limit that is missed by its whole bound outweighs, where limits may be missed."""


@dataclass(frozen=True)
class Row:
    """`coefficients @ x <= bound` over the program's variables [N]. It may be missed by shares of `scale`; 0: never."""

    coefficients: Floats
    bound: float
    scale: float = 0.0


@dataclass(frozen=True)
class Solution:
    """A placement, its sum of scores, and the least sum that any placement can have: equal where it is proved."""

    placement: Placement
    score: float
    least: float


class Program:
    """Placements of a space, as zeros and ones.

    Args:
        choices: names per layer.

    Attributes:
        keys: the (layer, name) of every variable.
    """

    def __init__(self, choices: Sequence[Sequence[str]]) -> None:
        self.choices = [tuple(names) for names in choices]
        self.keys = [(layer, name) for layer, names in enumerate(self.choices) for name in names]

    def vector(self, values: Mapping[tuple[int, str], float]) -> Floats:
        """[N] of a value for every (layer, name)."""
        return np.array([values[key] for key in self.keys])

    def tangent(self, piece: Piece, at: Placement) -> list[Row]:
        """A piece as rows: linear in the changes of single layers of `at`, and without the names that it cannot
        predict. A sum over the layers is linear everywhere, and its row exact.

        Raises UserError where `at` itself is not predicted.
        """
        base = piece.value(at)
        changes: dict[tuple[str, str], float] = {}
        for layer, name in self.keys:
            if (at[layer], name) not in changes:
                try:
                    change = piece.value((*at[:layer], name, *at[layer + 1 :])) - base if name != at[layer] else 0.0
                except UserError:
                    change = math.nan
                changes[at[layer], name] = change
        found = np.array([changes[at[layer], name] for layer, name in self.keys])
        rows = [Row(np.nan_to_num(found), piece.bound - base, abs(piece.bound))]
        return [*rows, Row(np.isnan(found).astype(float), 0.0)] if np.isnan(found).any() else rows

    def linear(self, piece: Piece, original: Placement) -> list[Row] | None:
        """A piece as rows, around the first placement of one kind that it predicts. None where there is none."""
        for name in ("", *dict.fromkeys(name for _, name in self.keys)):
            at = tuple(name if name in names else own for own, names in zip(original, self.choices, strict=True))
            try:
                return self.tangent(piece, at)
            except UserError:
                continue
        return None

    def apart(self, placement: Placement, distance: int) -> Row:
        """At least `distance` layers differ from a placement."""
        same = np.array([float(placement[layer] == name) for layer, name in self.keys])
        return Row(same, len(placement) - distance)

    def solve(
        self,
        scores: Floats,
        limits: Sequence[Sequence[Sequence[Row]]] = (),
        count: int | None = None,
        elastic: bool = False,
        begin: Placement | None = None,
    ) -> Solution | None:
        """The placement with the least sum of scores, or None where none is within the limits.

        Args:
            scores: [N].
            limits: each is met where all rows of one of its alternatives are met.
            count: full-attention layers.
            elastic: limits may be missed, at a high price for each share of the bound.
            begin: a placement from which to begin, of use where it is within the limits.
        """
        parts: list[tuple[Row, int]] = []  # the alternative's own variable, -1 for none
        switches: list[range] = []
        for alternatives in limits:
            own = range(0)
            if len(alternatives) != 1:
                start = switches[-1].stop if switches else 0
                own = range(start, start + len(alternatives))
                switches.append(own)
            parts += [(row, own[i] if own else -1) for i, rows in enumerate(alternatives) for row in rows]
        # What costs the same everywhere is counted: integer counts make the choices of the layers integer as well,
        # and are far fewer.
        full = np.array([float(is_full(name)) for _, name in self.keys])
        table = np.array([full, *(row.coefficients for row, _ in parts)])
        kinds, group = np.unique(table, axis=1, return_inverse=True)
        layers, names = len(self.choices), len(self.keys)
        counted = 2 * kinds.shape[1] <= names
        counts = kinds.shape[1] if counted else 0
        first = names + counts
        slack = first + (switches[-1].stop if switches else 0)
        total = slack + (len(parts) if elastic else 0)
        lines, lower, upper = [], [], []

        def add(low: float, high: float, *entries: tuple[Any, Any]) -> None:
            line = np.zeros(total)
            for columns, values in entries:
                line[columns] = values
            lines.append(line)
            lower.append(low)
            upper.append(high)

        # Where the coefficients of a row over all choices stand, and what they are.
        columns = slice(names, first) if counted else slice(0, names)
        values = kinds if counted else table
        for layer in range(layers):
            add(1.0, 1.0, ([i for i, (at, _) in enumerate(self.keys) if at == layer], 1.0))
        for number in range(counts):
            add(0.0, 0.0, (np.flatnonzero(group.ravel() == number), 1.0), (names + number, -1.0))
        if count is not None:
            add(count, count, (columns, values[0]))
        for own in switches:
            add(1.0, math.inf, (slice(first + own.start, first + own.stop), 1.0))
        for number, (row, switch) in enumerate(parts, 1):
            scale = float(np.abs(row.coefficients).max(initial=0.0)) or 1.0
            bound = row.bound / scale
            entries: list[tuple[Any, Any]] = [(columns, values[number] / scale)]
            if switch >= 0:
                spare = max(0.0, self._most(row.coefficients) / scale - bound)
                entries.append((first + switch, spare))
                bound += spare
            if elastic:
                entries.append((slack + number - 1, -row.scale / scale))
            add(-math.inf, bound, *entries)
        goal = np.concatenate([scores, np.zeros(slack - names), np.full(total - slack, SLACK_WEIGHT)])
        integer = np.arange(total) < slack
        integer[:names] = not counted
        known = None
        if begin is not None:
            chosen = np.array([float(begin[layer] == name) for layer, name in self.keys])
            of_kinds = np.bincount(group.ravel(), chosen, counts)[:counts]
            known = np.concatenate([chosen, of_kinds, np.zeros(total - first)])
        found = _run(np.array(lines), np.array(lower), np.array(upper), goal, integer, known)
        if found is None:
            return None
        chosen, least = found
        picked = {layer: name for (layer, name), value in zip(self.keys, chosen, strict=False) if value > 0.5}
        return Solution(tuple(picked[i] for i in range(layers)), float(goal @ chosen), least)

    def _most(self, coefficients: Floats) -> float:
        """The largest sum that any placement has."""
        best: dict[int, float] = {}
        for (layer, _), value in zip(self.keys, coefficients, strict=True):
            best[layer] = max(best.get(layer, -math.inf), float(value))
        return sum(best.values())


def _run(
    matrix: Floats,
    lower: Floats,
    upper: Floats,
    goal: Floats,
    integer: NDArray[np.bool_],
    start: Floats | None = None,
) -> tuple[Floats, float] | None:
    """(values [N], proved bound of the goal) of variables from 0 on."""
    import highspy

    solver, lp = _solver(), highspy.HighsLp()
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.col_cost_, lp.row_lower_, lp.row_upper_ = goal, lower, upper
    lp.col_lower_, lp.col_upper_ = np.zeros(len(goal)), np.full(len(goal), math.inf)
    kinds = highspy.HighsVarType
    lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in integer]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    rows, columns = np.nonzero(matrix)
    lp.a_matrix_.start_ = np.searchsorted(rows, np.arange(len(matrix) + 1))
    lp.a_matrix_.index_, lp.a_matrix_.value_ = columns, matrix[rows, columns]
    with _stdout_to_stderr():
        solver.passModel(lp)
        if start is not None and (matrix @ start <= upper + 1e-9).all() and (matrix @ start >= lower - 1e-9).all():
            known = highspy.HighsSolution()
            known.col_value = start
            solver.setSolution(known)
        solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        raise MachineError(f"the integer program was not solved: {solver.modelStatusToString(status)}")
    return np.array(solver.getSolution().col_value), float(solver.getInfo().mip_dual_bound)


OPTIONS = {
    "output_flag": False, "threads": 1, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "mip_allow_restart": False,
    "mip_detect_symmetry": False, "mip_heuristic_effort": 0.0, "mip_heuristic_run_rins": False,
    "mip_heuristic_run_rens": False, "mip_heuristic_run_root_reduced_cost": False,
    "mip_heuristic_run_feasibility_jump": False, "mip_allow_cut_separation_at_nodes": False,
    "mip_pscost_minreliable": 0,
}  # fmt: skip
"""One thread, for the same answer again; exact; and without heuristics, which take longer than these programs."""


@cache
def _solver() -> Any:
    import highspy

    with _stdout_to_stderr():
        solver = highspy.Highs()
    for option, value in OPTIONS.items():
        solver.setOptionValue(option, value)
    return solver


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS prints its banner on the process's standard output, whatever it was told."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
