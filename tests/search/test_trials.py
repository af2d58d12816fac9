"""trials.csv and front.csv: what is written is read back, bad cells are named, the front is what pareto says."""

import itertools
import math
import threading
from dataclasses import replace

import pytest
from search.synthetic import SyntheticObjective

from nasbench.core.errors import UserError
from nasbench.search.session import Options, Search, run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import Trial, add_trials, front_rows, read_front, read_trials, write_front


@pytest.fixture
def run(tmp_path):
    assert "beam" in STRATEGIES
    search = Search(tmp_path, SyntheticObjective(8), Options((2, 4), evaluations=20))
    run_search(search, "beam")
    return search


def test_round_trip_is_exact(run):
    trials = read_trials(run.path)
    assert trials[0].trial == 1
    assert [t.trial for t in trials] == list(range(1, len(trials) + 1))
    assert add_trials(run.path, trials) == trials
    unknown = replace(trials[0], strategy="other", kl=math.nan)
    add_trials(run.path, [unknown])
    assert math.isnan(read_trials(run.path)[-1].kl)


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("loss", "abc", "trials.csv:3:loss: 'abc' is not a number"),
        ("k", "2.5", "trials.csv:3:k: '2.5' is not a whole number"),
        ("placement", "8?", "trials.csv:3:placement: bad placement"),
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
    with pytest.raises(UserError, match=r"trials\.csv:\d+"):
        read_trials(run.path)
    run.path.write_text("")
    with pytest.raises(UserError, match=r"trials\.csv:1: empty"):
        read_trials(run.path)
    run.path.write_text("trial,strategy\n1,beam\n")
    with pytest.raises(UserError, match="no column 'k'"):
        read_trials(run.path)
    run.path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a CSV"):
        read_trials(run.path)


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
    base = Trial(
        1, "uniform", 1, "A J", 3.0, 0.1, 0.1, 10.0, 1.0, 1, 1.0, "d", 1, 1, "bf16", "measured", 0.0, "now", "v"
    )
    (row,) = front_rows([base, replace(base, trial=2, strategy="beam")], 8.0)
    assert row.strategy == "beam"
    assert front_rows([], 8.0) == []
