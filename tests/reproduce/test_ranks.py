"""What loss and KL say of benchmarks and retrieval."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasbench.reproduce import summary
from nasbench.reproduce.items import Items, subject_of
from nasbench.reproduce.ranks import kendall, rank_rows
from nasbench.reproduce.recipe import Candidate, Plan
from nasbench.reproduce.table import Facts


def pair_by_pair(x, y, groups):
    """Tau-b by its definition."""
    signs = [
        (np.sign(x[i] - x[j]), np.sign(y[i] - y[j]))
        for i, j in itertools.combinations(range(len(x)), 2)
        if groups[i] == groups[j]
    ]
    whole = math.sqrt(sum(a**2 for a, _ in signs) * sum(b**2 for _, b in signs))
    return sum(a * b for a, b in signs) / whole if whole else math.nan


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=2, max_size=12))
def test_tau_is_that_of_its_definition(rows):
    x, y, groups = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    tau, low, high = kendall(x, y, groups)
    assert tau == pytest.approx(pair_by_pair(x, y, groups), nan_ok=True)
    assert math.isnan(tau) or -1 <= low <= high <= 1


def test_a_sure_order_and_none():
    x = np.arange(30.0)
    one = np.zeros(30)
    assert kendall(x, x**3, one) == pytest.approx((1, 1, 1))
    assert kendall(x, -x, one) == pytest.approx((-1, -1, -1))
    tau, low, high = kendall(x, np.random.default_rng(1).permutation(x), one)
    assert low < 0 < high
    assert low < tau < high
    assert all(math.isnan(value) for value in kendall(x, np.ones(30), one))


@pytest.fixture
def facts(tmp_path):
    """Six placements, three of K = 1, three of K = 2. Loss orders retrieval of equal K backwards, of all forwards."""
    items, plan = Items(tmp_path / "items.jsonl"), Plan(tmp_path / "plan.json")
    teacher = Candidate(4, "teacher", ("A",) * 4, weights="teacher")
    kinds = ["AJJJ", "JAJJ", "JJAJ", "AAJJ", "AJAJ", "AJJA"]
    rows = [Candidate(kind.count("A"), f"random-{i}", tuple(kind)) for i, kind in enumerate(kinds)]
    plan.add_candidates([teacher, *rows, Candidate(2, "beam", tuple("AAJJ")), Candidate(0, "uniform", tuple("JJJJ"))])
    losses, answers = (3.0, 3.1, 3.2, 2.0, 2.1, 2.2), (0.1, 0.2, 0.3, 0.7, 0.8, 0.9)
    for row, loss, right in zip(rows, losses, answers, strict=True):
        items.add(subject_of(row), "v", {"loss": np.array([loss]), "retrieval@96:4": np.array([right])})
        items.add(subject_of(row), "v", {"choices": np.array([right, right]), "kl": np.array([loss])})
    items.add(subject_of(teacher), "v", {"choices": np.ones(2), "retrieval@96:4": np.ones(1)})
    return Facts(plan, items, None, {"choices": 0.0}, 1)


def test_pairs_of_equal_count_are_another_question(facts):
    rows = {(row["score"], row["pairs"], row["measure"]): row for row in rank_rows(facts)}
    assert set(rows) == {
        (score, pairs, name)
        for score in ("loss", "kl")
        for pairs in ("all", "equal K")
        for name in ("suite", "retrieval_96_n4")
    }
    # Nine pairs of 15 have different K. What the beam found is the random one again, and counts once.
    assert rows["loss", "all", "suite"]["tau"] == pytest.approx((9 - 6) / 15)
    assert rows["loss", "equal K", "retrieval_96_n4"]["tau"] == pytest.approx(-1)
    assert {row["placements"] for row in rows.values()} == {6}


def test_few_items_and_few_placements_say_nothing(facts):
    candidates = facts.plan.candidates
    facts.items.add(subject_of(candidates[-1]), "v", {"loss": np.ones(1), "choices@1": np.ones(1)})
    assert {row["placements"] for row in rank_rows(facts)} == {6}
    for row in candidates[1:3]:
        facts.items.values.pop((subject_of(row), "choices"))
    assert {row["measure"] for row in rank_rows(facts)} == {"retrieval_96_n4"}


def test_the_page_shows_what_is_sure_in_bold(facts):
    head, lines = summary._ranks(facts)
    assert head == ["score", "pairs", "benchmarks", "retrieval 96"]
    assert [line[:2] for line in lines] == [["loss", "all"], ["loss", "equal K"], ["KL", "all"], ["KL", "equal K"]]
    assert lines[1][2] == "-1.00 (-1.00 to -1.00)"
    for (subject, measure), values in list(facts.items.values.items()):
        if measure == "choices":
            facts.items.add(subject, "v", {"loss": -values})
    assert summary._ranks(facts)[1][1][2] == "**1.00 (1.00 to 1.00)**"
