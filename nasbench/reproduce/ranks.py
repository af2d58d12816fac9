"""ranks.csv: what the cheap scores of a search, loss and KL, say of the measures that are dear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nasbench.reproduce.items import mean_and_error, subject_of
from nasbench.reproduce.recipe import Candidate
from nasbench.reproduce.table import Cells, Facts, column, measures, suite_score

SCORES = ("loss", "kl")
FEWEST = 5
"""Placements; the order of fewer says nothing."""
DRAWS = 1000
"""Of placements, for the intervals."""


def rank_rows(facts: Facts) -> list[Cells]:
    """Kendall's tau-b between a score and a measure, positive where less loss goes with more accuracy, over placements
    with the supernet's weights and the best fillers that were asked all items of the measure.

    `pairs` is `all`, or `equal K` for pairs with as many layers of full attention: those that a search chooses among.
    `low` and `high` bound 95 % of the values over placements drawn anew with replacement.
    """
    rows: list[Cells] = []
    known = _known(facts)
    values = {name: _values(facts, known, name) for name in (*SCORES, *_measures(facts))}
    counts = np.array([candidate.k for candidate in known])
    for score in SCORES:
        for pairs in ("all", "equal K"):
            for name in _measures(facts):
                there = ~np.isnan(values[score]) & ~np.isnan(values[name])
                groups = counts if pairs == "equal K" else np.zeros(len(counts))
                # Who is alone in its group is in no pair.
                there &= np.array([(groups[there] == group).sum() > 1 for group in groups], dtype=bool)
                if there.sum() < FEWEST:
                    continue
                tau, low, high = kendall(-values[score][there], values[name][there], groups[there])
                if not math.isnan(tau):
                    rows.append(
                        {"score": score, "pairs": pairs, "measure": name, "placements": int(there.sum()), "tau": tau,
                         "low": low, "high": high}
                    )  # fmt: skip
    return rows


def kendall(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Kendall's tau-b (Kendall 1945) of the pairs within groups, and the bounds of 95 % of it over items drawn anew.

    Args:
        x, y: (n,) values of the same items.
        groups: (n,); pairs of different groups do not count. All NaN where x or y ties in every pair.
    """
    same = groups[:, None] == groups[None, :]
    of_x, of_y = (np.sign(values[:, None] - values[None, :]) * same for values in (x, y))
    # How often each item is drawn; the first row is the items as they are.
    drawn = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), size=DRAWS)
    weights = np.vstack([np.ones(len(x)), drawn])
    together, alone_x, alone_y = (
        ((weights @ matrix) * weights).sum(axis=1) for matrix in (of_x * of_y, of_x**2, of_y**2)
    )
    whole = np.sqrt(alone_x * alone_y)
    taus = np.divide(together, whole, out=np.full(len(weights), math.nan), where=whole > 0)
    if math.isnan(taus[0]):
        return math.nan, math.nan, math.nan
    low, high = np.nanpercentile(taus[1:], (2.5, 97.5))
    return float(taus[0]), float(low), float(high)


def _known(facts: Facts) -> list[Candidate]:
    """One candidate of each placement: two searches may have found the same."""
    mine = [row for row in facts.plan.candidates if row.weights == "supernet" and row.fill == "best"]
    return list({subject_of(row): row for row in mine}.values())


def _measures(facts: Facts) -> list[str]:
    """What is dear, by its column in table.csv."""
    found = measures(facts.items, ("retrieval", "agreement"))
    suite = ["suite"] if facts.chances else []
    return [*suite, *(column(name) for name in found if not name.endswith(".prefix"))]


def _values(facts: Facts, known: Sequence[Candidate], name: str) -> np.ndarray:
    """(n,) means of a measure; NaN where it was not measured."""
    if name == "suite":
        scores = [suite_score(facts, subject_of(row)) for row in known]
        return np.array([math.nan if score is None else score.average for score in scores])
    named = {column(measure): measure for _, measure in facts.items.values}
    return np.array([mean_and_error(facts.items.get(subject_of(row), named.get(name, name)))[0] for row in known])
