"""Placements measured by several processes: the same scores as by one, nothing twice, none lost with a process."""

import json
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from supernet_tiny import one_thread, text_file, tiny_model

from nasbench.cli import eval_many
from nasbench.cli.eval_many import ManyOptions, evaluate_many, helper_devices
from nasbench.core.errors import UserError
from nasbench.evaluation.evaluator import Evaluator
from nasbench.evaluation.scores import ScoreStore
from nasbench.evaluation.tasks import parse_tasks
from nasbench.parallel import pool as pool_module
from nasbench.parallel.pool import Job, Pool
from nasbench.runs import Run, RunSpec
from nasbench.search.compared import Compared, compared, read_benchmarks
from nasbench.search.measuring import Measurer, choose, measure_all, queue, share_of
from nasbench.search.objective import RunObjective, Speed
from nasbench.search.session import Options, Session, run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import Target
from nasbench.spaces.placement import parse_placement
from nasbench.supernet.finalize import finalize
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

__all__ = ["one_thread", "text_file", "tiny_model"]
FP32 = torch.float32
OPTIONS = ManyOptions(
    "auto", "agreement@128,retrieval@96:2,retrieval@128:2", "retrieval@96:2", "", 2, "128", 0.0, "", "", "fp32"
)


@pytest.fixture(scope="module")
def measured(tiny_model, text_file, tmp_path_factory):
    """A run that was searched and finalised, measured by one process; its benchmark folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("measured")
    (folder / "suite").mkdir()
    questions = [{"query": "the layer", "choices": ["holds", "a key"], "gold": i % 2} for i in range(4)]
    (folder / "suite" / "choices.jsonl").write_text("\n".join(map(json.dumps, questions)))
    run = Run.create(folder / "run", RunSpec(str(tiny_model), ("A", "W8", "J"), 4, str(text_file), 32))
    config = DistillConfig(ridge_tokens=256, align_tokens=256, supernet_tokens=256, supernet_batch_tokens=128)
    distill(run, config, dtype=FP32)
    evaluator = Evaluator.open(run, dtype=FP32, search_tokens=128, test_tokens=128)
    speed = lambda p: Speed(1e3 / (1 + p.count("A")), math.nan, 1.0 + p.count("A"), 1000, "measured")  # noqa: E731
    objective = RunObjective(Target("test", 128, 1, "fp32"), evaluator, speed)
    assert "beam" in STRATEGIES
    run_search(Session(run.path, objective, Options((1,), evaluations=6, random=1)), "beam")
    final = next(row for row in compared(run) if row.method == "beam")
    finalize(run, final.placement, config, 128, dtype=FP32)
    evaluate_many(run.path, options(suite=str(folder / "suite")), "cpu")
    return run, folder / "suite"


def options(**changes):
    return ManyOptions(**{**vars(OPTIONS), **changes})


@pytest.fixture
def unmeasured(measured, tmp_path):
    """A copy of the run without what was measured on the test split."""
    run, suite = measured
    shutil.copytree(run.path, tmp_path / "run")
    lines = (run.scores / "samples.jsonl").read_text().splitlines()
    lines = [line for line in lines if json.loads(line)["settings"].startswith("search")]
    (tmp_path / "run" / "scores" / "samples.jsonl").write_text("".join(line + "\n" for line in lines))
    return Run.open(tmp_path / "run"), suite


def scores_of(run):
    """{key: samples} of the file, each once."""
    rows = [json.loads(line) for line in (run.scores / "samples.jsonl").read_text().splitlines()]
    found = {tuple(row[name] for name in ("weights", "placement", "task", "settings")): row["samples"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_everything_is_measured_with_its_own_weights(measured):
    run, _ = measured
    store = ScoreStore(run.scores)
    rows = compared(run)
    for row in rows:
        tasks = {key.task for key in store.find(placement=row.text) if not key.settings.startswith("search")}
        assert tasks >= {"loss", "kl", "agreement@128", "retrieval@96:2", "retrieval@128:2", "suite:choices"}, row
    final = next(row for row in rows if row.weights == "final")
    assert len({key.weights for key in store.find(placement=final.text, task="kl")}) == 2
    assert read_benchmarks(run)["choices"].chance == 0.5


def test_two_devices_measure_what_one_does(measured, unmeasured, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, suite = unmeasured
    evaluate_many(run.path, options(suite=str(suite), workers="cpu,cpu"), "cpu")
    assert scores_of(run) == scores_of(measured[0])
    assert "of " in (run.path / "eval-1.log").read_text()

    # Nothing is left to do, for however many.
    before = scores_of(run)
    monkeypatch.setattr(pool_module, "_start", lambda job: pytest.fail("started for nothing"))
    evaluate_many(run.path, options(suite=str(suite), workers="cpu,cpu,cpu"), "cpu")
    assert scores_of(run) == before


def test_the_share_of_a_child_that_fails_is_done_here(unmeasured):
    run, _ = unmeasured
    measurer = Measurer(run, device="cpu", dtype=FP32, test_tokens=128)
    pairs = queue(compared(run), parse_tasks("retrieval@96:2"), ())
    said = []
    failing = Job("cpu", ("no-such-command",), run.path / "eval-1.log")
    with Pool([failing]) as children:
        assert measure_all(measurer, pairs, children, [1], 2, time.time() + 60, said.append)
    assert len(said) == 1
    assert said[0].startswith("measuring on cpu stopped, cpu does the rest: nasbench: No such command")
    assert not any(measurer.missing(pair) for pair in pairs)


def test_time_is_up(unmeasured, capsys):
    run, _ = unmeasured
    evaluate_many(run.path, options(seconds=1e-9), "cpu")
    assert "measurements done: the same command continues" in capsys.readouterr().err
    assert {key[2] for key in scores_of(run) if not key[3].startswith("search")} == {"loss", "kl"}


def test_a_killed_child_is_reported_and_a_running_one_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "COMMAND", (pool_module.sys.executable, "-c"))
    jobs = [
        Job("one", ("import os; os.kill(os.getpid(), 9)",), tmp_path / "1.log"),
        Job("two", ("import sys; sys.stdin.read()",), tmp_path / "2.log"),
    ]
    with Pool(jobs) as children:
        ends = time.monotonic() + 20
        while not (failed := children.failed()) and time.monotonic() < ends:
            time.sleep(0.02)
        assert failed == [(0, "killed by SIGKILL")]
        assert children.failed() == []
        assert children.running()
    assert not children.running()


def test_what_was_chosen_is_measured_first():
    final = Compared(2, "beam", parse_placement("2A J"), weights="final")
    teacher = Compared(3, "teacher", parse_placement("3A"), weights="teacher")
    beams = [Compared(2, "beam", parse_placement("2A J")), Compared(1, "beam", parse_placement("A 2J"))]
    others = [Compared(1, "random-0", parse_placement("J A J")), Compared(1, "uniform", parse_placement("J A J"), "J")]
    pairs = queue([*others, *beams, final, teacher], ["all"], ["few"])
    assert [row for row, _ in pairs] == [final, teacher, *beams, *others, *others]
    assert [tasks for _, tasks in pairs] == [("all",)] * 4 + [("few",)] * 2 + [("all",)] * 2
    assert len(queue(others, ["all"], [])) == 2


def test_the_queue_is_dealt_out_in_turn():
    rows = [Compared(1, f"random-{i}", tuple("A" if j == i else "J" for j in range(5))) for i in range(5)]
    twin = Compared(1, "beam", rows[1].placement)
    pairs = [(row, (1,)) for row in (*rows[:2], twin)] + [(row, few) for few in ((0,), (1,)) for row in rows[2:]]
    shares = [share_of(pairs, number, 2) for number in range(2)]
    assert shares[0] == [(rows[0], (1,)), (rows[2], (0,)), (rows[4], (0,)), (rows[2], (1,)), (rows[4], (1,))]
    assert shares[1] == [(rows[1], (1,)), (twin, (1,)), (rows[3], (0,)), (rows[3], (1,))]
    assert share_of(pairs, 0, 1) == pairs


def test_sets_of_placements(measured, tmp_path):
    run, _ = measured
    parse = parse_placement
    assert {row.weights for row in choose(run, "final", parse)} == {"teacher", "final"}
    assert not any(row.method.startswith("random") for row in choose(run, "searched", parse))
    (tmp_path / "mine.txt").write_text("2A 2J\n\n4J\n")
    assert [(row.k, row.text) for row in choose(run, str(tmp_path / "mine.txt"), parse)] == [(2, "2A 2J"), (0, "4J")]
    with pytest.raises(UserError, match=r"unknown set of placements 'finals': .* did you mean 'final'"):
        choose(run, "finals", parse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "absent"}, "bad --suite absent"),
        ({"share": "2/2"}, "bad --share '2/2'"),
        ({"seconds": -1.0}, "bad --seconds"),
        ({"workers": "cpu,cup"}, "did you mean 'cpu'"),
        ({"tasks": "retrieval@2k:x"}, "bad number of items"),
    ],
)
def test_bad_options(measured, monkeypatch, changes, message):
    monkeypatch.setattr(eval_many, "time", SimpleNamespace(time=lambda: pytest.fail("work began")))
    with pytest.raises(UserError, match=message):
        evaluate_many(measured[0].path, options(**changes), "cpu")


def test_devices_are_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert helper_devices("", "cpu") == ()
    assert helper_devices("cpu, cpu,cpu", "cpu") == ("cpu", "cpu")
    for text, told in (
        ("cuda:0,cuda:1", "unknown worker device 'cuda:0': choose from cpu$"),
        ("cpu,", "unknown worker device ''"),
    ):
        with pytest.raises(UserError, match=told):
            helper_devices(text, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert helper_devices("cuda:0,cuda:1", "cuda") == ("cuda:1",)
    assert helper_devices("cuda,cpu", "cuda:0") == ("cpu",)
    with pytest.raises(UserError, match=r"bad --workers 'cuda:1,cuda:0': .* own device, cuda:0$"):
        helper_devices("cuda:1,cuda:0", "cuda")
