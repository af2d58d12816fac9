"""Budgets in seconds: the largest step that fits, tokens that fill the time, and that stopping changes nothing."""

import json
from types import SimpleNamespace

import pytest
import torch

from nasbench.supernet import budget as budget_module
from nasbench.supernet.budget import Budget, FinalBudget, final_history, note_final
from nasbench.supernet.settings import DistillConfig


@pytest.fixture
def budget(tmp_path):
    def make(device="cpu", **settings):
        run = SimpleNamespace(supernet=tmp_path, spec=SimpleNamespace(names=("A", "W8", "J"), sequence=1024))
        return Budget(run, DistillConfig(**settings), None, None, device, lambda line: None)

    return make


def timed(tok_s=1000.0, fits=4096):
    def step(self, stage, changes):
        size = changes[f"{stage}_batch_tokens"]
        if size > fits:
            return None
        return {"batch_tokens": size, "tok_s": tok_s, "graphs": bool(changes.get("graphs")), "peak_bytes": 1 << 30}

    return step


def test_seconds_become_tokens_once(monkeypatch, budget, tmp_path):
    monkeypatch.setattr(Budget, "_timed_step", timed())
    made = budget(align_batch_tokens=16384, supernet_batch_tokens=2048)
    settings = made.settings({"align": 10.0, "supernet": 0.0})
    assert (settings.align_tokens, settings.align_batch_tokens) == (8192, 4096)
    assert settings.supernet_tokens == DistillConfig().supernet_tokens
    settings = made.settings({"align": 10.0, "supernet": 5.0})
    assert (settings.supernet_tokens, settings.supernet_batch_tokens, settings.graphs) == (4096, 2048, False)

    # Another speed changes nothing that is decided; more seconds add tokens at the speed of then.
    monkeypatch.setattr(Budget, "_timed_step", lambda *_: pytest.fail("timed again"))
    assert budget().settings({"align": 10.0}).align_tokens == 8192
    assert budget().settings({"align": 5.0}).align_tokens == 8192
    assert budget().settings({"align": 20.0}).align_tokens == 4 * 4096
    assert json.loads((tmp_path / "budget.json").read_text())["align"]["seconds"] == 20


def test_seconds_and_tokens_give_the_fewer(monkeypatch, budget):
    monkeypatch.setattr(Budget, "_timed_step", timed())
    made, told = budget(align_batch_tokens=1024), []
    made.log = told.append
    assert made.settings({"align": 10.0}, {"align": 2048}).align_tokens == 2048
    assert not any("leave out" in line for line in told)
    assert made.settings({"align": 10.0}, {"align": 16384}).align_tokens == 9 * 1024
    assert "align: 10 s leave out 7,168 of 16,384 tokens" in told


def test_a_row_that_does_not_fit_is_an_error(monkeypatch, budget):
    monkeypatch.setattr(Budget, "_timed_step", timed(fits=512))
    with pytest.raises(Exception, match="not one row of 1024 tokens fits into a step of align"):
        budget(align_batch_tokens=4096).stage("align", 1.0)


@pytest.mark.parametrize(
    ("device", "replayed", "free", "graphs"),
    [
        ("cuda", 200.0, 4 << 30, True),
        ("cuda", 101.0, 4 << 30, False),
        ("cuda", None, 4 << 30, False),
        ("cuda", 200.0, (4 << 30) - 1, False),
        ("cpu", 200.0, 4 << 30, False),
    ],
)
def test_graphs_are_used_where_they_fit_and_are_faster(monkeypatch, budget, device, replayed, free, graphs):
    tried = []

    def step(self, stage, changes):
        tried.append(changes)
        tok_s = replayed if changes.get("graphs") else 100.0
        found = {"batch_tokens": 4096, "tok_s": tok_s, "graphs": bool(changes.get("graphs")), "peak_bytes": 1 << 30}
        return found if tok_s else None

    monkeypatch.setattr(Budget, "_timed_step", step)
    monkeypatch.setattr(budget_module, "free_bytes", lambda _: free)
    assert budget(device).stage("supernet", 1.0)["graphs"] is graphs
    assert any(changes.get("graphs") for changes in tried) is (device == "cuda" and free >= 4 << 30)
    assert budget(device).stage("align", 1.0)["tok_s"] == 100


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("CUDA error: out of memory")])
def test_a_step_that_does_not_fit_is_none_and_any_other_error_passes(monkeypatch, budget, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(budget_module, "Distiller", fails)
    assert budget()._timed_step("align", {}) is None
    error = RuntimeError("shapes do not fit each other")
    with pytest.raises(RuntimeError, match="shapes"):
        budget()._timed_step("align", {})


def test_a_finalisation_that_was_stopped_is_not_thought_faster(monkeypatch, tmp_path):
    """The first quarter takes 100 s, of which 60 before it is stopped: 300 s are left for the rest, at that speed."""
    clock, asked = [0.0], []
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: clock[0])

    def finalise(seconds):
        made = FinalBudget(tmp_path, "v", 500.0, 1000)
        tokens = made.tokens(seconds)

        def work():
            asked.append(tokens)
            clock[0] += {1: 60.0, 2: 40.0}.get(len(asked), 300.0)
            if len(asked) == 1:
                raise KeyboardInterrupt
            return tmp_path

        made.timed(tokens, work)

    with pytest.raises(KeyboardInterrupt):
        finalise(100.0)
    finalise(100.0)
    finalise(400.0)
    assert asked == [50_000, 50_000, 200_000]
    # Done: neither the whole nor the quarter of it begins anew, but another supernet's does.
    finalise(400.0)
    finalise(100.0)
    assert len(asked) == 3
    assert FinalBudget(tmp_path, "other", 500.0, 1000).tokens(100.0) == 50_000


def test_a_folder_remembers_the_weights_that_it_held(tmp_path, monkeypatch):
    versions = iter(["a", "b", "b"])
    monkeypatch.setattr(budget_module, "final_version", lambda folder: next(versions))
    for tokens in (10, 40, 40):
        note_final(tmp_path, tokens)
    assert final_history(tmp_path) == {"a": 10, "b": 40}
