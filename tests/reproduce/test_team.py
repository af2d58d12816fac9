"""Placements measured by several processes: the same values as by one, nothing twice, none lost with a process."""

import json
import math
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nasbench.cli.reproduce_command import helper_devices
from nasbench.core.errors import UserError
from nasbench.core.files import read_json
from nasbench.parallel import pool as team
from nasbench.reproduce import measure, page
from nasbench.reproduce.driver import reproduce, write_report
from nasbench.reproduce.items import Items, Subject
from nasbench.reproduce.measure import Measurer, share_of
from nasbench.reproduce.page import read
from nasbench.reproduce.recipe import Candidate, Recipe
from nasbench.supernet.settings import DistillConfig

COMMAND = "nasbench reproduce"
FALLS = """
import sys
from nasbench.reproduce import measure, worker
whole, asked = measure.Measurer.pair, []
def pair(self, pair):
    asked.append(pair)
    if len(asked) > 2:
        raise MemoryError("no room for\\nit; advice")
    whole(self, pair)
measure.Measurer.pair = pair
worker.main()
"""
"""A member of the team that dies of its third placement."""


@pytest.fixture
def threads(monkeypatch):
    """Members compute as this process does."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def without_figures():
    """They take longer to draw than the tiny model takes to measure; test_reproduce.py looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "figures", lambda _: [])
        yield


@pytest.fixture(scope="module")
def measured(tiny_model, text_file, tmp_path_factory):
    """(recipe, folder of a run that is measured by one process)."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "suite").mkdir()
    questions = [{"query": "the layer", "choices": ["holds", "a key"], "gold": i % 2} for i in range(4)]
    (folder / "suite" / "choices.jsonl").write_text("\n".join(map(json.dumps, questions)))
    recipe = Recipe(
        model=str(tiny_model), names=("A", "W8", "J"), data=str(text_file), suite=folder / "suite", sequence=32,
        counts=(0, 1, 4), finalized=(1,), seeds=1, remedies=("average",),
        training=DistillConfig(
            ridge_tokens=256, align_batch_tokens=128, supernet_batch_tokens=128, frozen=(), solved=(), documents=False
        ),
        align_seconds=0.05, supernet_seconds=0.05, search_seconds=0.05, finalize_seconds=0.05, speed_seconds=0,
        measure_seconds=120, search_tokens=64, test_tokens=128, contexts=(128,), batches=(1,), quick_items=2,
        retrieval=(96, 128), quick_retrieval=(96,), retrieval_items=2,
    )  # fmt: skip
    torch.set_num_threads(1)
    run(recipe, folder / "run")
    return recipe, folder / "run"


def run(recipe, out, helpers=()):
    said = []
    reproduce(recipe, out, COMMAND, device="cpu", dtype=torch.float32, log=said.append, helpers=helpers)
    return said


@pytest.fixture
def unmeasured(measured, tmp_path):
    """(recipe, a copy of the run without what the last stage measured)."""
    recipe, folder = measured
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    (out / "items.jsonl").unlink()
    shutil.rmtree(out / "report")
    return recipe, out


def lines_of(out, pattern="items*.jsonl"):
    """{(placement, weights, version, measure): values} of the files, each once."""
    rows = [json.loads(line) for path in out.glob(pattern) for line in path.read_text().splitlines()]
    found = {(row["placement"], row["weights"], row["version"], row["measure"]): row["values"] for row in rows}
    assert len(found) == len(rows)
    return found


def same_items(out, folder):
    found, expected = Items(out / "items.jsonl"), Items(folder / "items.jsonl")
    assert found.versions == expected.versions
    assert all(np.array_equal(found.values[key], expected.values[key]) for key in expected.values)


def same_tables(out, folder):
    return all(read(out / "report" / name) == read(folder / "report" / name) for name in ("table.csv", "suite.csv"))


def test_two_devices_measure_what_one_does(measured, unmeasured, threads, monkeypatch):
    recipe, folder = measured
    _, out = unmeasured
    plan = read_json(out / "plan.json")
    said = run(recipe, out, ("cpu",))
    assert not any("stopped" in line or "same command" in line for line in said)
    same_items(out, folder)
    other, mine = lines_of(out, "items-1.jsonl"), lines_of(out, "items.jsonl")
    assert {key[:2] for key in other} < {key[:2] for key in mine}
    assert {key[3] for key in other} >= {"choices", "choices@2", "retrieval@96:2", "retrieval@128:2", "agreement@128"}
    assert not any(key[3] in ("loss", "kl") for key in other)
    assert sorted(path.name for path in out.glob("*-1.*")) == ["items-1.jsonl", "measure-1.log"]
    assert {**read_json(out / "plan.json"), "seconds": 0} == {**plan, "seconds": 0}
    assert same_tables(out, folder)

    shutil.rmtree(out / "report")
    write_report(out, recipe, COMMAND)
    assert same_tables(out, folder)

    # Nothing is left to do, for however many.
    monkeypatch.setattr(team.Team, "start", lambda *_: pytest.fail("started for nothing"))
    before = {path: path.read_text() for path in out.glob("items*.jsonl")}
    run(recipe, out, ("cpu", "cpu"))
    run(recipe, out)
    assert {path: path.read_text() for path in out.glob("items*.jsonl")} == before
    assert same_tables(out, folder)


def test_a_stopped_team_leaves_what_it_has_and_a_fallen_member_its_share(measured, unmeasured, threads, monkeypatch):
    recipe, folder = measured
    _, out = unmeasured
    started = []
    start = team.Team.start

    def noted(self, number):
        start(self, number)
        started.append(self._members[number])

    def stopped(self, pair):
        """Ctrl-C once the other process has measured something."""
        ends = time.monotonic() + 60
        while time.monotonic() < ends and not (out / "items-1.jsonl").is_file():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(team.Team, "start", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Measurer, "pair", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, out, ("cpu",))
    assert started[0].poll() is not None
    assert (out / "report" / "index.html").is_file()
    kept = (out / "items-1.jsonl").read_text()
    assert kept

    (out / "items-1.jsonl").write_text(kept + '{"placement": "4')
    monkeypatch.setattr(team, "COMMAND", (sys.executable, "-c", FALLS))
    said = run(recipe, out, ("cpu",))
    assert len(started) == 2
    told = [line for line in said if line.startswith("measuring on cpu stopped, cpu does the rest")]
    assert told == ["measuring on cpu stopped, cpu does the rest: MemoryError: no room for (exit code 1)"]
    assert not any("same command" in line for line in said)
    same_items(out, folder)
    assert same_tables(out, folder)


@pytest.mark.parametrize(("share", "written"), [(1e-9, 1), (1e9, 5)])
def test_tables_take_a_share_of_the_time(monkeypatch, share, written):
    """Five placements, after each of which the tables are due; once they took long, they wait."""
    monkeypatch.setattr(measure, "REFRESH_S", 0.0)
    monkeypatch.setattr(measure, "REFRESH_SHARE", share)
    alone = SimpleNamespace(job=team.Job("out", "cpu", "float32", 0, 1, time.time() + 60, {}), running=lambda: False)
    alone.fallen = list
    measurer = SimpleNamespace(bench=SimpleNamespace(progress=lambda *_: None), pair=lambda pair: time.sleep(0.01))
    order = [(Candidate(1, f"random-{i}", tuple("JJJJJ"[:i] + "A" + "JJJJJ"[i:])), True) for i in range(5)]
    refreshed = []
    measure.work_through(measurer, order, alone, lambda: refreshed.append(time.sleep(0.01)))
    assert len(refreshed) == written


def test_time_is_up_for_all(unmeasured, monkeypatch):
    recipe, out = unmeasured
    monkeypatch.setattr(team.Team, "start", lambda *_: pytest.fail("started for nothing"))
    said = run(Recipe.from_json({**recipe.as_json(), "measure_seconds": 0}), out, ("cpu",))
    assert any("placements measured: the same command goes on" in line for line in said)
    assert {key[3] for key in lines_of(out)} == {"loss", "kl"}


def test_a_killed_member_is_told_of_and_a_running_one_stopped(tmp_path):
    job = team.Job(str(tmp_path), "cpu", "float32", 0, 3, 0.0, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "COMMAND", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
        with team.Team(job, ("cpu", "cpu")) as members:
            members.start(1)
            patch.setattr(team, "COMMAND", (sys.executable, "-c", "import sys; sys.stdin.read()"))
            members.start(2)
            ends = time.monotonic() + 20
            while not (fallen := members.fallen()) and time.monotonic() < ends:
                time.sleep(0.02)
            assert fallen == [(1, "killed by SIGKILL")]
            assert members.fallen() == []
            assert members.running()
            second = members._members[2]
        assert second.returncode is not None
        assert not members.running()


def test_the_queue_is_dealt_out_in_turn():
    rows = [Candidate(1, f"random-{i}", tuple("A" if j == i else "J" for j in range(5))) for i in range(5)]
    twin = Candidate(1, "beam", rows[1].placement)
    pairs = [(row, True) for row in (*rows[:2], twin)] + [(row, full) for full in (False, True) for row in rows[2:]]
    shares = [share_of(pairs, number, 2) for number in range(2)]
    assert shares[0] == [(rows[0], True), (rows[2], False), (rows[4], False), (rows[2], True), (rows[4], True)]
    assert shares[1] == [(rows[1], True), (twin, True), (rows[3], False), (rows[3], True)]
    assert share_of(pairs, 0, 1) == pairs


def test_items_of_several_files_are_one(tmp_path, monkeypatch):
    path, clock = tmp_path / "items.jsonl", iter(range(1000, 2000))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    one, two = Subject("4A", "teacher"), Subject("4J", "supernet")
    old = {"placement": "4J", "weights": "supernet", "version": "v0", "measure": "kl", "values": [9]}
    path.write_text(json.dumps(old) + "\n")
    main, first, second = Items(path), Items(path, 1), Items(path, 2)
    assert second.has(two, "v0", "kl")
    first.add(two, "v1", {"kl": np.array([1.0, 2.0])})
    main.add(one, "teacher", {"loss": np.array([3.0])})
    with (tmp_path / "items-1.jsonl").open("a") as file:
        file.write('{"placement": "4J", "wei')
    assert main.has(two, "v0", "kl")
    main.read()
    assert main.has(two, "v1", "kl")
    assert main.get(two, "kl").tolist() == [1, 2]
    # The latest counts, in whichever file, and a line begins behind a torn one.
    second.add(two, "v2", {"kl": np.array([4.0])})
    main.add(two, "v3", {"kl": np.array([5.0])})
    Items(path, 1).add(one, "teacher", {"kl": np.array([0.0])})
    found = Items(path)
    assert found.get(two, "kl").tolist() == [5]
    assert found.get(one, "loss").tolist() == [3]
    assert found.get(one, "kl").tolist() == [0]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["items-1.jsonl", "items-2.jsonl", "items.jsonl"]


def test_a_recipe_survives_json():
    recipe = Recipe(suite=None, measure_seconds=math.inf, training=DistillConfig(frozen=("W", "J"), align_lr=1e-3))
    assert Recipe.from_json(json.loads(json.dumps(recipe.as_json()))) == recipe
    assert Recipe.from_json(json.loads(json.dumps(Recipe().as_json()))) == Recipe()


def test_devices_are_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert helper_devices("", "cpu") == ()
    assert helper_devices("cpu, cpu,cpu", "cpu") == ("cpu", "cpu")
    for text, told in (
        ("cuda:0,cuda:1", "unknown measure device 'cuda:0': choose from cpu$"),
        ("cpu,", "unknown measure device ''"),
        ("cpu,cup", "did you mean 'cpu'"),
    ):
        with pytest.raises(UserError, match=told):
            helper_devices(text, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert helper_devices("cuda:0,cuda:1", "cuda") == ("cuda:1",)
    assert helper_devices("cuda,cpu", "cuda:0") == ("cpu",)
    assert helper_devices("cuda:1,cuda:0", "cuda:1") == ("cuda:0",)
    with pytest.raises(UserError, match="unknown measure device 'cuda:2': choose from cpu, cuda, cuda:0, cuda:1;"):
        helper_devices("cuda:0,cuda:2", "cuda")
    with pytest.raises(UserError, match=r"bad --measure-devices 'cuda:1,cuda:0': .* own device, cuda:0$"):
        helper_devices("cuda:1,cuda:0", "cuda")
