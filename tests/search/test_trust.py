"""Intervals and paired tests against samples whose truth is known; how stable the order of placements is."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from search.synthetic import SyntheticObjective, search

from nasbench.evaluation.scores import Scores
from nasbench.search.session import run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import read_trials
from nasbench.search.trust import trust


class Evaluator:
    """Scores of the synthetic objective: hard and easy items, which all placements share, and noise of each."""

    def __init__(self, objective, noise, items=200, splits=("search", "test")):
        source = np.random.default_rng(1)
        self.hard, self.noise = source.exponential(2.0, items), noise
        self.objective, self.splits = objective, splits

    def context(self, split):
        return split

    def known(self, placement, task, split):
        if split not in self.splits:
            return None
        source = np.random.default_rng(zlib.crc32(f"{placement} {split}".encode()))
        samples = self.hard + self.objective.kl(placement) + source.normal(0.0, self.noise, len(self.hard))
        return Scores.of(samples, "nats", task == "accuracy")


def known_of(tmp_path, noise, **options):
    objective = SyntheticObjective(seed=4)
    objective.scaled_terms = lambda: [(1.0, 1.0, "kl")]
    assert "beam" in STRATEGIES
    run = search(tmp_path, objective, full_attention=(2, 4), evaluations=40)
    pairs = run_search(run, "beam")
    return trust(Evaluator(objective, noise, **options), objective, pairs, run.trials(), read_trials(run.path)), pairs


def test_a_clear_gain_is_told_from_none(tmp_path):
    found, pairs = known_of(tmp_path, 0.01)
    assert [row.k for row in found.verdicts] == [2, 4]
    for row, pair in zip(found.verdicts, pairs, strict=True):
        truth = pair.uniform.kl - pair.searched.kl
        assert row.low < truth < row.high
        assert row.gain == pytest.approx(truth, abs=0.01)
        assert row.p == pytest.approx(1e-3, rel=1)
        assert row.split == "test"
        assert " beats the evenly spread " in str(row)
    noisy, _ = known_of(tmp_path / "noisy", 30.0)
    assert all("does not differ" in str(row) and row.p > 0.01 for row in noisy.verdicts)


def test_the_order_is_stable_where_items_are_and_unstable_where_not(tmp_path):
    calm, _ = known_of(tmp_path / "calm", 0.01)
    wild, _ = known_of(tmp_path / "wild", 10.0)
    for stable, unstable in zip(calm.stability, wild.stability, strict=True):
        assert stable.by == unstable.by
        assert stable.tau > 0.95 > unstable.tau + 0.1
        assert stable.low <= stable.tau <= stable.high
    assert [row.by for row in calm.stability] == ["other items", "the test split"]
    assert calm.stability[0].first > wild.stability[0].first


def test_other_weights_show_whether_training_changes_the_order(tmp_path):
    assert "uniform" in STRATEGIES
    for version, seed in (("v1", 0), ("v2", 0), ("v3", 7)):
        run = search(tmp_path, SyntheticObjective(seed=seed, version=version), full_attention=(0, 1, 2, 4, 8))
        run_search(run, "uniform")
    objective = SyntheticObjective(version="v2")
    objective.scaled_terms = list
    run = search(tmp_path, objective)
    found = trust(Evaluator(objective, 1.0), objective, [], run.trials(), read_trials(run.path))
    taus = {row.by: row.tau for row in found.stability}
    assert taus["the weights v1"] == pytest.approx(1.0)
    assert taus["the weights v3"] < 1.0


def test_without_items_nothing_is_said(tmp_path):
    found, _ = known_of(tmp_path, 1.0, splits=())
    assert (found.verdicts, found.stability, str(found)) == ([], [], "")
    few, _ = known_of(tmp_path / "few", 1.0, items=4)
    assert (few.verdicts, few.stability) == ([], [])
    alone = SimpleNamespace(scaled_terms=lambda: [(1.0, 1.0, "accuracy"), (0.5, 2.0, "kl")])
    found = trust(Evaluator(SyntheticObjective(), 1.0), alone, [], [], [])
    assert found.stability == []


def test_accuracies_count_the_other_way_round(tmp_path):
    objective = SyntheticObjective(seed=4)
    objective.scaled_terms = lambda: [(1.0, 1.0, "accuracy")]
    run = search(tmp_path, objective, full_attention=(2,), evaluations=30)
    pairs = run_search(run, "beam")
    found = trust(Evaluator(objective, 0.01), objective, pairs, run.trials(), [])
    assert "is worse than" in str(found)
