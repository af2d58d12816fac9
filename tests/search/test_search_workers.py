"""Workers that share a storage: they open it at once, may be killed, lose nothing, do nothing twice, and end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from search.synthetic import search

from nasbench.core.errors import UserError
from nasbench.search.session import run_search
from nasbench.search.storage import open_study
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import read_trials

TESTS = Path(__file__).parents[1]
BUDGET = 40


def server_program(name):
    """A program of PostgreSQL: of the path, or of Debian's package."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(places[-1]) if places else shutil.which(name)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """URL of a PostgreSQL server that lives as long as the module's tests, on a socket in its own folder."""
    initdb, postgres = server_program("initdb"), server_program("postgres")
    if not initdb or not postgres:
        pytest.skip("PostgreSQL is not installed: no initdb")
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="nasbench-pg-"))  # a socket's path has at most 107 characters
    # The server refuses to run as root.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres")
    subprocess.run(
        [initdb, "-D", folder / "data", "-U", "tester", "-A", "trust", "--no-sync"],
        check=True,
        stdout=subprocess.DEVNULL,
        **user,
    )
    options = ["-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    log = (folder / "log.txt").open("wb")
    server = subprocess.Popen([postgres, "-D", folder / "data", *options], stderr=log, **user)
    url = f"postgresql://tester@/postgres?host={folder}"
    try:
        ends = time.monotonic() + 30
        while not (folder / ".s.PGSQL.5432").exists() and time.monotonic() < ends:
            assert server.poll() is None
            time.sleep(0.05)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # which ends sessions, too
        server.wait(30)
        shutil.rmtree(folder)


def storage_of(kind, folder, request):
    if kind == "postgresql":
        return request.getfixturevalue("postgresql")
    return f"sqlite:///{folder}/optuna.db" if kind == "sqlite" else str(folder / "shared.journal")


def start(folder, storage, count, budget=BUDGET):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(TESTS / "search" / "worker_script.py"), str(folder), storage, str(budget)]
    with (folder / "log.txt").open("ab") as log:
        found = [subprocess.Popen(command, env=environment, stderr=log, cwd=TESTS.parent) for _ in range(count)]
    until(lambda: len(list(folder.glob("ready-*"))) == count, found)
    (folder / "go").touch()
    return found


def until(true, workers, seconds=200):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        assert any(worker.poll() is None for worker in workers)
        time.sleep(0.005)


def evaluated(folder):
    path = folder / "evaluated.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_four_workers_of_which_two_are_killed(tmp_path, request, kind):
    """No finished trial is lost, none is run twice, the budget is kept, and the others come to an end."""
    storage = storage_of(kind, tmp_path, request)
    workers = start(tmp_path, storage, 4)
    until(lambda: len(evaluated(tmp_path)) > 12, workers)
    for worker in workers[:2]:
        worker.kill()
        worker.wait()
    at_kill = {line.split("\t")[0] for line in evaluated(tmp_path)}
    codes = [worker.wait(200) for worker in workers[2:]]
    assert codes == [0, 0], (tmp_path / "log.txt").read_text()
    # What was being evaluated when its worker died may run once more: its score was not kept.
    counts = Counter(line.split("\t")[0] for line in evaluated(tmp_path))
    assert max(counts.values()) == 1
    trials = [trial for trial in read_trials(tmp_path / "trials.csv") if trial.strategy == "optuna"]
    assert len(trials) == len({trial.placement for trial in trials}) == BUDGET
    assert at_kill <= {trial.placement for trial in read_trials(tmp_path / "trials.csv")}

    # Another search reads the same storage, and has nothing left to do.
    again = search(tmp_path, evaluations=BUDGET, storage=storage)
    run_search(again, "optuna")
    assert again.objective.asked == []


def test_a_dead_workers_lock_and_half_line_stop_nobody(tmp_path):
    """The link that Optuna's own lock leaves behind, and a line without its end."""
    assert "optuna" in STRATEGIES
    run_search(search(tmp_path, evaluations=12), "optuna")
    path = tmp_path / "optuna.journal"
    (tmp_path / "optuna.journal.lock").symlink_to(path)
    study = open_study("other", "", path)
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "worker')
    began = time.monotonic()
    study.set_user_attr("alive", True)
    run_search(search(tmp_path, evaluations=20), "optuna")
    assert time.monotonic() - began < 20
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert open_study("other", "", path).user_attrs == {"alive": True}


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nosuch://x", "'nosuch://x' does not open: .*nosuch"),
        ("sqlite:////nonexistent/folder/x.db", "does not open: .*unable to open"),
        ("postgresql://nobody@/none?host=/nonexistent", "'postgresql://nobody.* does not open"),
    ],
)
def test_a_storage_that_does_not_open_is_one_line(tmp_path, monkeypatch, storage, message):
    monkeypatch.setattr("nasbench.search.storage.ATTEMPTS", 2)
    with pytest.raises(UserError, match=message) as told:
        run_search(search(tmp_path, evaluations=5, storage=storage), "optuna")
    assert "\n" not in str(told.value)
