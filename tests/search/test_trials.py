"""trials.csv and front.csv: what is written is read back, bad cells are named, the front is what pareto says."""

import itertools
import math
import threading
from dataclasses import replace

import pytest
from search.synthetic import SyntheticObjective
from search.synthetic import search as search_in

from nasbench.core.errors import UserError
from nasbench.evaluation.scores import ScoreStore
from nasbench.search.session import run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import (
    Trial,
    add_trials,
    best_of,
    front_rows,
    latest,
    read_front,
    read_trials,
    write_front,
)


@pytest.fixture
def run(tmp_path):
    assert "beam" in STRATEGIES
    search = search_in(tmp_path, SyntheticObjective(8), full_attention=(2, 4), evaluations=20)
    run_search(search, "beam")
    return search


def test_round_trip_is_exact(run):
    trials = read_trials(run.path)
    assert trials[0].trial == 1
    assert [t.trial for t in trials] == list(range(1, len(trials) + 1))
    add_trials(run.path, trials)
    assert read_trials(run.path) == trials
    assert all(trial.kl == trial.score == trial.loss - 2.5 for trial in trials)
    # Questions of the same name may have changed.
    add_trials(run.path, [replace(trials[1], score=7.0)])
    assert [trial.score for trial in read_trials(run.path)] == [trials[0].score, 7.0, *(t.score for t in trials[2:])]
    unknown = replace(trials[0], strategy="other", settings="search/other text")
    add_trials(run.path, [unknown])
    assert math.isnan(read_trials(run.path)[-1].kl)


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("score", "abc", "trials.csv line 3 column score: bad value 'abc'"),
        ("k", "2.5", "trials.csv line 3 column k: bad value '2.5'"),
        ("placement", "8?", "trials.csv line 3 column placement: bad placement"),
    ],
)
def test_a_bad_cell_is_named(run, column, bad, message):
    lines = run.path.read_text().splitlines()
    cells = lines[2].split(",")
    cells[lines[0].split(",").index(column)] = bad
    run.path.write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        read_trials(run.path)


def test_a_cut_file_is_named(run):
    text = run.path.read_text()
    run.path.write_text(text[: len(text) - 40])
    with pytest.raises(UserError, match=r"trials\.csv line \d+"):
        read_trials(run.path)
    run.path.write_text("")
    with pytest.raises(UserError, match=r"trials\.csv line 1"):
        read_trials(run.path)
    run.path.write_text("trial,strategy\n1,beam\n")
    with pytest.raises(UserError, match="no column k"):
        read_trials(run.path)
    run.path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a CSV"):
        read_trials(run.path)


OLD = """trial,strategy,k,placement,loss,loss_stderr,kl,decode_tok_s,prefill_tok_s,cache_bytes,step_ms,device,\
context,batch,dtype,source,seconds,created_utc,supernet
1,teacher,4,4A,3.0,0.1,0.0,10.0,,100,1.0,d,64,1,bf16,measured,0.2,2026-01-01T00:00:00Z,v1
2,beam,1,A 3J,3.5,0.1,,20.0,,50,0.5,d,64,1,bf16,measured,0.2,2026-01-01T00:00:00Z,v1
"""


def test_losses_of_an_old_file_move_into_the_score_store(tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text(OLD)
    before = read_trials(path)
    assert [(t.loss, t.kl, t.score, t.objective) for t in before[:1]] == [(3.0, 0.0, 0.0, "kl")]
    assert (before[1].score, before[1].objective) == (3.5, "loss")
    add_trials(path, [replace(before[0], strategy="other")])
    assert "loss" not in path.read_text().splitlines()[0].split(",")
    after = read_trials(path)
    assert [(t.strategy, t.loss, t.loss_stderr) for t in after] == [
        ("teacher", 3.0, 0.1), ("beam", 3.5, 0.1), ("other", 3.0, 0.1)
    ]  # fmt: skip
    assert math.isnan(after[1].kl)
    assert {key.settings for key in ScoreStore(tmp_path / "scores").find()} == {"trials.csv"}


def test_a_loss_that_is_not_finite_is_left_out_by_name(tmp_path, caplog):
    path = tmp_path / "trials.csv"
    path.write_text(OLD.replace("A 3J,3.5,0.1,", "A 3J,nan,nan,nan"))
    assert [trial.placement for trial in read_trials(path)] == ["4A"]
    assert "trials.csv line 3: left out: the loss of A 3J is nan" in caplog.text


def test_scores_of_different_objectives_do_not_compare(run):
    first = read_trials(run.path)[-1]
    other = replace(first, objective="retrieval@512", score=-1.0, strategy="greedy-swap", k=9)
    add_trials(run.path, [other])
    trials = read_trials(run.path)
    assert latest(trials, first.target) == trials
    assert trials[-1] not in latest(trials, first.target, first.scoring)
    assert best_of(trials).strategy == "greedy-swap"
    assert best_of(trials[:-1]).score > 0
    assert front_rows([trials[-1]], 1.0)[0].front_score == -1.0


def test_two_writers_lose_nothing(run, tmp_path):
    first = read_trials(run.path)[0]
    path = tmp_path / "shared.csv"

    def write(worker):
        for index in range(10):
            add_trials(path, [replace(first, strategy=f"w{worker}-{index}")])

    workers = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({t.strategy for t in read_trials(path)}) == 30


def test_front_holds_the_teacher_and_nothing_dominated(run, tmp_path):
    trials = run.trials()
    rows = front_rows(trials, 8.0, lambda layers: (1.5, 0.1, math.nan))
    assert rows[0].placement == "8A"
    assert [row.rank for row in rows] == list(range(1, len(rows) + 1))
    assert all(a.loss <= b.loss and a.decode_tok_s <= b.decode_tok_s for a, b in itertools.pairwise(rows))
    for trial in trials:
        assert any(row.loss <= trial.loss and row.decode_tok_s >= trial.decode_tok_s for row in rows)
    assert rows[0].hypervolume > 0
    assert rows[0].loss_test == 1.5

    path = tmp_path / "front.csv"
    other = [replace(row, device="other") for row in rows[:2]]
    write_front(path, other[0].target, other)
    write_front(path, rows[0].target, rows)
    write_front(path, rows[0].target, rows)
    assert len(read_front(path)) == len(rows) + 2


def test_a_point_found_by_a_search_and_uniform_is_the_searchs():
    target = {"device": "d", "context": 1, "batch": 1, "dtype": "bf16"}
    speed = {"decode_tok_s": 10.0, "prefill_tok_s": 1.0, "cache_bytes": 1, "step_ms": 1.0, "source": "measured"}
    about = {"seconds": 0.0, "created_utc": "now", "supernet": "v", "settings": "s", "eval_dtype": "fp32"}
    base = Trial("uniform", 1, "A J", **speed, **target, **about, loss=3.0)
    (row,) = front_rows([base, replace(base, trial=2, strategy="beam")], 8.0)
    assert row.strategy == "beam"
    assert front_rows([], 8.0) == []
