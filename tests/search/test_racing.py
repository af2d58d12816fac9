"""Early stopping: the error is bounded, and a search that stops placements early ends with the same ranking."""

import numpy as np
import pytest
import torch
from made_up_rows import profile_rows
from supernet_tiny import make_run, one_thread, save_supernet, text_file, tiny_model

from nasbench.api import search
from nasbench.checkpoints.load import load_model
from nasbench.search import objective, racing
from nasbench.store import Database
from nasbench.supernet.supernet import Supernet

__all__ = ["make_run", "one_thread", "text_file", "tiny_model"]


@pytest.mark.parametrize(("p", "freedom", "expected"), [(0.999, 7, 4.785), (0.999, 31, 3.375), (0.9999, 15, 4.880)])
def test_the_quantile_of_student(p, freedom, expected):
    assert racing.t_quantile(p, freedom) == pytest.approx(expected, rel=5e-3)


def test_the_best_are_stopped_as_rarely_as_stated():
    """40 placements of nearly the same score: what one look says of the best four of all rows is often wrong."""
    source = np.random.default_rng(0)
    wrong = stopped = 0
    for _ in range(400):
        text = source.gamma(2.0, 1.0, size=64)
        true = np.sort(source.exponential(0.1, size=40))
        rows = text + true[:, None] + 0.02 * source.normal(size=(40, 64)) * text
        _, gaps = racing.race(rows[:, :16], 64, 4)
        best = np.argsort(rows.mean(1))[:4]
        wrong += bool((gaps[best] > 0).any())
        stopped += int((gaps > 0).sum())
    assert wrong <= 400 * 10 * racing.ERROR
    assert stopped > 400 * 10
    rival, gaps = racing.race(np.tile([[1.0], [1.0], [2.0]], 16), 64, 1)
    assert (rival, np.isnan(gaps).tolist()) == (0, [True, True, False])


def test_a_search_that_stops_early_ranks_alike(make_run, tmp_path, monkeypatch):
    Database(tmp_path / "test-device.csv").merge(profile_rows())
    found = {}
    for name in ("early", "whole"):
        run = make_run(name)
        torch.manual_seed(0)
        net = Supernet(load_model(run.spec.model), run.spec.space)
        for mixer in net.trained().values():  # layers that differ
            for parameter in mixer.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        save_supernet(net, run.supernet)
        if name == "whole":
            monkeypatch.setattr(objective, "first_look", lambda rows: 0)
        found[name] = search(
            run.path, "kl-greedy", full_attention=(1, 2), evaluations=40, db=tmp_path, profile="test-device",
            context=128, batch=2, search_tokens=1024, test_tokens=0,
        )  # fmt: skip
    early, whole = found["early"], found["whole"]
    assert [pair.searched.placement for pair in early.comparisons] == [p.searched.placement for p in whole.comparisons]
    assert [row.placement for row in early.front] == [row.placement for row in whole.front]
    (note,) = (note for note in early.notes if "stopped early" in note)
    assert float(note.split(": ")[1].split("x fewer")[0]) > 1.1
    assert not any("stopped early" in note for note in whole.notes)
