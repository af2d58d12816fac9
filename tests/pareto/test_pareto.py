"""Dominance, front and hypervolume against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nasbench.search.pareto import dominates, front, hypervolume


@st.composite
def problems(draw, objectives=(1, 2, 3, 4)):
    """Points on a small integer grid (ties and repeats are common) and a sense per objective."""
    m = draw(st.sampled_from(objectives))
    n = draw(st.integers(0, 8))
    points = draw(arrays(np.float64, (n, m), elements=st.integers(0, 5).map(float)))
    return points, draw(st.lists(st.booleans(), min_size=m, max_size=m))


def cells(points, maximise):
    """Volume by counting the unit cells of [0, 6]^M (minimised) that some point dominates."""
    costs = np.where(maximise, 5.0 - points, points)
    corners = itertools.product(range(6), repeat=len(maximise))
    return sum(bool((costs <= np.array(corner)).all(axis=1).any()) for corner in corners)


@given(problems())
def test_front_is_what_nothing_dominates(problem):
    points, maximise = problem
    expected = [not any(dominates(other, point, maximise) for other in points) for point in points]
    assert front(points, maximise).tolist() == expected


@given(problems())
def test_hypervolume_counts_cells(problem):
    points, maximise = problem
    reference = np.where(maximise, -1.0, 6.0)
    assert hypervolume(points, reference, maximise) == pytest.approx(cells(points, maximise))


@given(problems(objectives=(2, 3)))
def test_the_front_alone_has_the_whole_hypervolume(problem):
    points, maximise = problem
    reference = np.where(maximise, -1.0, 6.0)
    mask = front(points, maximise)
    assert hypervolume(points[mask], reference, maximise) == pytest.approx(hypervolume(points, reference, maximise))


def test_known_front():
    points = [[3.0, 10.0], [2.0, 8.0], [2.5, 8.0], [4.0, 20.0], [4.0, 20.0]]
    assert front(points, [False, True]).tolist() == [True, True, False, True, True]


def test_nan_is_never_on_the_front_and_hides_nothing():
    assert front([[np.nan, 1e9], [1.0, 1.0]], [False, True]).tolist() == [False, True]
    assert hypervolume([[np.nan, 1e9], [1.0, 1.0]], [2.0, 0.0], [False, True]) == 1.0


def test_points_beyond_the_reference_add_nothing():
    assert hypervolume([[5.0, 10.0]], [4.0, 0.0], [False, True]) == 0.0
    assert hypervolume([], [4.0, 0.0], [False, True]) == 0.0


def test_equal_points_do_not_dominate_each_other():
    assert not dominates([1.0, 2.0], [1.0, 2.0], [False, True])
    assert dominates([1.0, 3.0], [1.0, 2.0], [False, True])
    assert not dominates([1.0, 1.0], [1.0, 2.0], [False, True])
