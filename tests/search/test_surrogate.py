"""The guess that orders candidates: prior first, then what was measured."""

import itertools

import numpy as np

from nasbench.search.surrogate import Surrogate


def test_starts_from_the_importance_and_learns_the_truth():
    truth = np.array([0.1, 0.5, 0.05, 0.3])
    model = Surrogate([0.4, 0.3, 0.2, 0.1])
    model.fit({frozenset(): 5.0})
    assert model.gains.tolist() == [0.4, 0.3, 0.2, 0.1]
    sets = [frozenset(c) for k in range(4) for c in itertools.combinations(range(4), k)]
    model.fit({s: 5.0 - sum(truth[i] for i in s) for s in sets})
    assert np.argsort(model.gains).tolist() == np.argsort(truth).tolist()


def test_negative_importance_is_no_promise():
    assert Surrogate([-1.0, 0.2]).gains.tolist() == [0.0, 0.2]
