"""Kendall's tau-b and its interval."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasbench.evaluation.ranks import kendall


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
