"""The score store: many writers lose nothing, a torn or bad line costs only itself, old files are read."""

import json
import math
from multiprocessing import get_context

import numpy as np
import pytest

from nasbench.core.errors import MachineError
from nasbench.evaluation.scores import Gap, ScoreKey, Scores, ScoreStore, difference

KEY = ScoreKey("v", "4A", "loss", "search/8x32/abcd", "float32")


def nats(*samples):
    return Scores.of(samples, "nats", False)


def test_a_score_is_read_back_exactly(tmp_path):
    store = ScoreStore(tmp_path / "scores")
    assert store.get(KEY) is None
    found = nats(1 / 3, 2.0, -1e-8)
    store.put({KEY: found})
    for each in (store, ScoreStore(tmp_path / "scores")):
        assert each.get(KEY) == found
        assert each.get(KEY).samples.tolist() == found.samples.tolist()
        assert each.get(KEY).about["utc"]
    store.put({KEY: nats(1.0, 2.0)})
    assert ScoreStore(tmp_path / "scores").get(KEY).n == 2


def _add(path, worker):
    for index in range(10):
        ScoreStore(path).put({ScoreKey("v", "4A", f"t{worker}-{index}", "s", "float32"): nats(1.5, 2.5)})


def test_writers_in_several_processes_lose_nothing(tmp_path):
    path, other = tmp_path / "scores", ScoreStore(tmp_path / "scores")
    context = get_context("spawn")
    workers = [context.Process(target=_add, args=(path, worker)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(ScoreStore(path).find()) == 20
    assert other.get(ScoreKey("v", "4A", "t1-9", "s", "float32")).value == 2.0


def test_a_torn_line_is_cut_by_the_next_writer(tmp_path):
    store = ScoreStore(tmp_path / "scores")
    store.put({KEY: nats(1.0)})
    whole = store.file.read_bytes()
    with store.file.open("ab") as file:
        file.write(b'{"weights":"v","placement":"4J"')
    assert list(ScoreStore(store.path).find()) == [KEY]
    new = ScoreKey("v", "4J", "loss", "s", "float32")
    ScoreStore(store.path).put({new: nats(2.0)})
    lines = store.file.read_bytes().splitlines(keepends=True)
    assert lines[0] == whole
    assert [json.loads(line)["placement"] for line in lines] == ["4A", "4J"]
    assert list(store.find()) == [KEY, new]


def test_a_file_that_became_shorter_is_read_anew(tmp_path):
    store = ScoreStore(tmp_path / "scores")
    store.put({KEY: nats(1.0, 2.0, 3.0)})
    store.file.unlink()
    new = ScoreKey("v", "4J", "loss", "s", "float32")
    store.put({new: nats(2.0)})
    assert list(ScoreStore(store.path).find()) == [new]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    store, other = ScoreStore(tmp_path / "scores"), ScoreKey("v", "4J", "kl", "s", "float32")
    with pytest.raises(MachineError, match=r"task kl of 4J: 1 of 2 samples are not finite.*version v"):
        store.put({KEY: nats(1.0), other: nats(1.0, bad)})
    assert not store.file.exists()


def test_a_line_that_is_no_score_is_left_out_with_a_warning(tmp_path, caplog):
    store = ScoreStore(tmp_path / "scores")
    store.put({KEY: nats(1.0), ScoreKey("v", "4J", "kl", "s", "float32"): nats(1.0)})
    good, bad = store.file.read_text().splitlines()
    store.file.write_text(f"{good}\n{bad.replace('[1]', '[NaN]')}\n{{}}\n")
    assert list(ScoreStore(store.path).find()) == [KEY]
    assert "task kl of 4J is not finite" in caplog.text
    assert caplog.text.count("left out") == 2


def test_find_and_table(tmp_path):
    store = ScoreStore(tmp_path / "scores")
    assert store.table().empty
    other = ScoreKey("w", "4J", "retrieval@512", "s", "float32")
    store.put({KEY: nats(1.0, 2.0), other: Scores.of([1, 0, 1, 1], "accuracy", True)})
    assert list(store.find(task="loss", weights="v")) == [KEY]
    assert store.find(task="loss", weights="w") == {}
    table = store.table().set_index("placement")
    assert table.loc["4J", "value"] == 0.75
    assert table.loc["4A", "n"] == 2
    assert list(table["task"]) == ["loss", "retrieval@512"]


def test_differences_are_paired():
    generator = np.random.default_rng(0)
    hard = generator.normal(size=400)
    ours, theirs = nats(*(hard + 0.1 + 0.01 * generator.normal(size=400))), nats(*hard)
    gap = difference(ours, theirs)
    assert gap.n == 400
    assert gap.low < 0.1 < gap.high
    assert gap.stderr < 0.001 < ours.stderr
    for other in (None, nats(1.0), Scores("nats", False, 1.0, 0.1, 400)):
        assert difference(ours, other).n == 0
        assert math.isnan(difference(ours, other).mean)
    assert Gap(1.0, 0.5, 2).high == pytest.approx(1.98)


def test_scores_of_old_runs_are_read(tmp_path, caplog):
    (tmp_path / "evals.csv").write_text(
        "placement,task,detail,version,dtype,metric,value,stderr,n,higher_is_better\n"
        "4A,loss,test/8x32/ab,v,float32,nats,1.5,0.1,8,0\n"
        "4J,loss,test/8x32/ab,v,float32,nats,nan,nan,8,0\n"
        "2A 2J,loss,test/8x32/ab,v,float32,nats,2.5,nan,1,0\n"
    )
    row = {"placement": "4J", "weights": "supernet", "version": "v", "measure": "retrieval@96:4"}
    lines = [{**row, "time": 2.0, "values": [1, 0]}, {**row, "time": 1.0, "values": [0, 0]}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"placement"')
    store = ScoreStore(tmp_path / "scores")
    assert {key.placement: scores.value for key, scores in store.find(task="loss").items()} == {"4A": 1.5, "2A 2J": 2.5}
    assert store.get(ScoreKey("v", "4A", "loss", "test/8x32/ab", "float32")).stderr == 0.1
    (found,) = store.find(task="retrieval@96:4").values()
    assert found.samples.tolist() == [1, 0]
    assert found.about["weights"] == "supernet"
    assert "evals.csv:3: left out" in caplog.text
    store.put({KEY: nats(1.0)})
    assert len(ScoreStore(tmp_path / "scores").find()) == 4
