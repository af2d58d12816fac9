"""The search that minds retrieval, against what it is said to compute."""

from types import SimpleNamespace

import pytest
import torch

from nasbench.evaluation.evaluator import Evaluator
from nasbench.reproduce.recall import Recall, exchange, recall_greedy
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

BASE = ("W8",) * 4


@pytest.fixture
def evaluator(make_run):
    run = make_run(names=("A", "W8", "J"))
    distill(run, DistillConfig(ridge_tokens=512, align_tokens=0, supernet_tokens=0), dtype=torch.float32)
    return Evaluator.open(run, dtype=torch.float32, search_tokens=256, test_tokens=512)


@pytest.fixture
def recall(evaluator):
    return Recall(evaluator, 96, BASE)


def search_over(evaluator, told):
    space = evaluator.supernet.space
    return SimpleNamespace(
        space=space,
        with_full=lambda layers: space.with_full_attention(BASE, frozenset(layers)),
        progress=lambda *what: told.append(what),
    )


def test_the_score_is_the_sum_of_two_shares(evaluator, recall):
    placement = ("W8", "A", "J", "W8")
    teacher, hybrid, bare = (evaluator.supernet.select(p) for p in (evaluator.supernet.space.original, placement, BASE))

    def on_answers(decoder):
        means = []
        for text in recall.texts:
            ids = torch.tensor([text.ids])
            log_q, log_p = (torch.log_softmax(m(ids)[0, -text.count - 1 : -1], -1) for m in (teacher, decoder))
            means.append((log_q.exp() * (log_q - log_p)).sum(-1).mean())
        return float(torch.stack(means).mean())

    def on_text(p):
        return evaluator.divergences([p])[0].value

    with torch.no_grad():
        expected = on_text(placement) / on_text(BASE) + on_answers(hybrid) / on_answers(bare)
    scores = recall.scores([placement, BASE, evaluator.supernet.space.original])
    assert scores[placement] == pytest.approx(expected, rel=1e-4)
    assert scores[BASE] == pytest.approx(2)
    assert scores[evaluator.supernet.space.original] == pytest.approx(0, abs=1e-5)


def test_each_level_restores_the_best_layer(evaluator, recall):
    search = search_over(evaluator, told := [])
    found = recall_greedy(search, recall, (1, 2), 100)
    scores = recall.scores([search.with_full({i}) for i in range(4)])
    assert found[1] == min(scores, key=scores.get)
    first = found[1].index("A")
    pairs = recall.scores([search.with_full({first, i}) for i in range(4) if i != first])
    assert found[2] == min(pairs, key=pairs.get)
    assert told == [("recall", 1, 2), ("recall", 2, 2)]


def test_a_small_budget_tries_the_best_single_layers(evaluator, recall, monkeypatch):
    asked = []
    scores = Recall.scores
    monkeypatch.setattr(Recall, "scores", lambda self, ps: asked.append(list(ps)) or scores(self, asked[-1]))
    found = recall_greedy(search_over(evaluator, []), recall, (1, 3), 5)
    assert list(map(len, asked)) == [4, 1, 1]
    assert found[3].count("A") == 3


class Scored:
    """Scores of two layers of six by a table of pairs, and how often it was asked."""

    def __init__(self, table):
        self.table, self.asked = table, 0

    def scores(self, placements):
        self.asked += len(placements)
        return {p: self.table.get(tuple(i for i, name in enumerate(p) if name == "A"), 1.0) for p in placements}


def pair(*layers):
    return tuple("A" if i in layers else "W8" for i in range(6))


OVER_SIX = SimpleNamespace(space=SimpleNamespace(num_layers=6), with_full=lambda layers: pair(*layers))


def test_one_layer_at_a_time_moves_where_it_is_better():
    # From 0 and 1 over 0 and 4 to 3 and 4; the pair 2 and 5 is better still, but two moves of no gain away.
    judge = Scored({(0, 1): 0.9, (0, 2): 0.8, (0, 4): 0.7, (3, 4): 0.5, (2, 5): 0.1})
    assert exchange(OVER_SIX, judge, [pair(1, 5), pair(0, 1)], 100) == pair(3, 4)
    assert exchange(OVER_SIX, judge, [pair(2, 5), pair(0, 1)], 100) == pair(2, 5)


@pytest.mark.parametrize("evaluations", [0, 1, 2, 4])
def test_exchanges_end_with_the_evaluations(evaluations):
    judge = Scored({(0, 1): 0.9, (1, 2): 0.8, (1, 3): 0.1})
    found = exchange(OVER_SIX, judge, [pair(0, 1)], evaluations)
    assert judge.asked == max(1, evaluations)
    # 2 is the nearest to 0 that is free, then 3.
    assert found == {0: pair(0, 1), 1: pair(0, 1), 2: pair(1, 2), 4: pair(1, 3)}[evaluations]
