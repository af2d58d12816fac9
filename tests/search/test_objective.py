"""What a search minimises: tasks and mixes of them, on text on which the alternatives can be told apart."""

import math
from dataclasses import replace

import pytest
import torch

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation.evaluator import Evaluator
from nasbench.search.objective import RunObjective, Speed, parse_objective
from nasbench.search.session import Options, Session, run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import Target, read_trials
from nasbench.spaces.placement import parse_placement
from nasbench.spaces.space import full_layers
from nasbench.supernet.supernet import Supernet

PLACEMENT = ("A", "W8", "J", "W8")


def evaluator_of(run, **tokens):
    loaded = load_model(run.spec.model, dtype=torch.float32)
    net = Supernet(loaded, run.spec.space)
    net.version = "made-up"
    tokens = {"search_tokens": 256, "test_tokens": 256, **tokens}
    return Evaluator(run, net, Corpus.load(run.spec.data, loaded.tokenizer, run.spec.sequence), **tokens)


@pytest.fixture
def evaluator(make_run):
    return evaluator_of(make_run())


def speed(placement):
    step_ms = 1.0 + sum(1.0 if name == "A" else 0.5 for name in placement)
    return Speed(1e3 / step_ms, math.nan, step_ms, 1000, "measured")


def objective(evaluator, text="kl"):
    return RunObjective(Target("here", 64, 1, "fp32"), evaluator, speed, text)


def test_objectives_are_weighted_tasks():
    said = [(weight, task.label) for weight, task in parse_objective("kl + 0.5*retrieval@1k:8+2*suite:a.jsonl")]
    assert said == [(1.0, "kl"), (0.5, "retrieval@1k:8"), (2.0, "suite:a.jsonl")]
    assert [task.label for _, task in parse_objective("loss")] == ["loss"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kll", "did you mean 'kl'"),
        ("0*kl", "bad weight '0'"),
        ("1.2.3*kl", "bad weight '1.2.3'"),
        ("kl+0.5*retrieval@x", "bad size"),
        ("", "unknown task"),
    ],
)
def test_bad_objectives_are_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_objective(text)


def test_a_task_alone_is_its_cost(evaluator):
    for text in ("loss", "kl", "retrieval@96:4", "retrieval-kl@96:4"):
        (found,) = objective(evaluator, text).measure([PLACEMENT])
        score = evaluator.measure([PLACEMENT], tasks=[text])[0][text]
        assert found.score == (1 - score.value if text.startswith("retrieval@") else score.value)
        kl = evaluator.measure([PLACEMENT])[0]["kl"].value
        assert found.kl == kl


def test_a_mix_is_the_sum_of_shares_of_what_the_best_single_kind_loses(evaluator):
    text = "kl+0.5*retrieval-kl@96:4"
    tasks = ["kl", "retrieval-kl@96:4"]
    space = evaluator.supernet.space
    measured = evaluator.measure([PLACEMENT, space.original, ("W8",) * 4, ("J",) * 4], tasks=tasks)
    whole = [min(each[task].value for each in measured[2:]) for task in tasks]
    expected = measured[0]["kl"].value / whole[0] + 0.5 * measured[0][tasks[1]].value / whole[1]
    world = objective(evaluator, text)
    assert world.measure([PLACEMENT])[0].score == pytest.approx(expected, rel=1e-4)
    assert world.measure([space.original])[0].score == pytest.approx(0, abs=1e-5)
    alone = world.measure([("A", "J", "A", "A")])[0]
    assert world.importance(("J",))[1, "J"] == alone.kl
    assert world.importance(("J",), by_score=True)[1, "J"] == pytest.approx(alone.score, rel=1e-3)


def test_a_term_that_tells_nothing_apart_is_left_out(evaluator, caplog, monkeypatch):
    world = objective(evaluator, "kl+retrieval@96:2")
    # The untrained model answers nothing, and no alternative can lose on it.
    score = world.measure([PLACEMENT])[0].score
    assert "retrieval@96:2 says nothing" in caplog.text
    assert score == pytest.approx(objective(evaluator).measure([PLACEMENT])[0].kl / world._scales[0][1])
    with pytest.raises(UserError, match="tells no placements apart"):
        objective(evaluator, "retrieval@96:2+2*retrieval@128:2").measure([PLACEMENT])


@pytest.mark.parametrize("text", ["kl", "loss", "kl+loss"])
def test_a_window_as_long_as_the_scored_text_is_left_out(make_run, caplog, text):
    """On rows of 32 tokens a window of 32 is full attention: KL 0, and the search would crown K = 0."""
    evaluator = evaluator_of(make_run(names=("A", "W8", "W32", "J")))
    world = objective(evaluator, text)
    assert world.space.names == ("A", "W8", "J")
    assert "W32 cannot be told from full attention on scored text of 32 tokens" in caplog.text
    assert f"texts of 32 tokens, the target's context has {world.target.context}: ruler@" in caplog.text
    search = Session(evaluator.run.path, world, Options(full_attention=(1,), evaluations=4))
    run_search(search, "beam")
    assert not any("W32" in trial.layers for trial in search.trials())
    assert objective(evaluator_of(make_run("other", names=("A", "W31"))), text).space.names == ("A", "W31")


def test_nothing_is_searched_where_nothing_can_be_told_apart(make_run):
    evaluator = evaluator_of(make_run(names=("A", "W64")))
    with pytest.raises(UserError, match=r"W64 cannot be told.*32 tokens.*--sequence"):
        objective(evaluator)
    with pytest.raises(UserError, match="W64"):
        objective(evaluator, "kl+retrieval@64:2")
    assert objective(evaluator, "kl+retrieval@128:2").space.names == ("A", "W64")


def test_documents_count_as_the_scored_text(make_run):
    """Rows of 32 tokens whose documents are at most 16 long: a window of 16 sees all of each."""
    evaluator = evaluator_of(make_run(names=("A", "W8", "W16")))
    assert objective(evaluator).space.names == ("A", "W8", "W16")
    ages = torch.arange(32).remainder(16).int().expand(len(evaluator.corpus.search), 32)
    evaluator.corpus = replace(evaluator.corpus, ages={**evaluator.corpus.ages, "search": ages})
    assert objective(evaluator).space.names == ("A", "W8")


def test_scores_of_other_text_are_never_taken_for_these(make_run):
    """A search with more tokens, or in another dtype, evaluates anew; with the same, nothing."""
    run = make_run()

    def searched(**tokens):
        search = Session(run.path, objective(evaluator_of(run, **tokens)), Options(full_attention=(1,), evaluations=4))
        run_search(search, "uniform")
        return search.trials()

    first, more = searched(), searched(search_tokens=512)
    assert {t.placement for t in first} == {t.placement for t in more}
    assert {t.settings for t in first}.isdisjoint({t.settings for t in more})
    assert all(a.loss != b.loss for a, b in zip(first, more, strict=True))
    assert all(trial.seconds > 0 for trial in more)
    assert searched() == first
    assert len(read_trials(run.trials)) == len(first) + len(more)


def test_retrieval_moves_what_a_search_finds(evaluator):
    """Every strategy minds the objective that it is given, and never compares scores of two."""
    assert "greedy-swap" in STRATEGIES
    path, found = evaluator.run.path, {}
    for text in ("kl", "kl+20*retrieval-kl@160:6"):
        search = Session(path, objective(evaluator, text), Options(full_attention=(1, 2), evaluations=24))
        pairs = run_search(search, "greedy-swap")
        for pair in pairs:
            assert pair.searched.objective == text
            assert pair.searched.score <= min(t.score for t in search.trials() if t.k == pair.k)
        found[text] = {trial.placement: trial.score for trial in search.trials()}
    shared = set(found["kl"]) & set(found["kl+20*retrieval-kl@160:6"])
    assert len(shared) > 4
    # What the first search found best is among the starts of the second.
    best = min(
        (t for t in read_trials(evaluator.run.trials) if t.objective == "kl" and t.k == 2), key=lambda t: t.score
    )
    assert full_layers(best.layers) in {full_layers(parse_placement(p)) for p in found["kl+20*retrieval-kl@160:6"]}
