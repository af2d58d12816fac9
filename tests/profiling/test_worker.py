"""Sweeps whose measuring processes are really killed, crash and hang; sweeps that are killed themselves."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from nasbench import store
from nasbench.core import registry
from nasbench.model import MIXERS
from nasbench.model.shapes import ModelSpec
from nasbench.profiling import worker as worker_module
from nasbench.profiling.sweep import prepare, run
from nasbench.profiling.worker import Worker, _ending, _oom_kills, _uninterrupted
from nasbench.store import read_db

TINY = ModelSpec("tiny", "llama", 4, 64, 128, 4, 2, 16, 256, 512, 1e4, 1e-5, defaults=(("W", "32"),))
ASKED = {"contexts": [64, 256], "batches": [1], "modes": ("decode",), "seconds_per_row": 0.002, "timeout_s": 3.0}


@pytest.fixture
def dangerous(monkeypatch, tmp_path):
    """The kind Z, found through the metadata of a distribution, here and in children."""
    package = tmp_path / "packages"
    metadata = package / "dangerous-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dangerous\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[nasbench.blocks]\nZ = dangerous:DangerousConfig\n")
    (package / "dangerous.py").write_text(Path(__file__).with_name("dangerous.py").read_text())
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setattr(MIXERS, "_discovered", False)
    monkeypatch.setattr(MIXERS, "_items", dict(MIXERS._items))
    found = [EntryPoint("Z", "dangerous:DangerousConfig", "nasbench.blocks")]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == "nasbench.blocks" else [])
    yield
    sys.modules.pop("dangerous", None)


def by_point(path: Path) -> dict[tuple[str, str, int], store.Row]:
    return {(row.block, row.args, row.context): row for row in read_db(path)}


def test_a_sweep_survives_killed_crashed_and_hung_processes(dangerous, tmp_path):
    result = run(prepare(TINY, ["Z2", "Z3", "Z4", "Z5", "Z6", "Z1"], db=tmp_path / "db", **ASKED))
    rows = by_point(result.path)
    ended = {args: rows["Z", args, 64] for args in "23456"}
    assert {args: row.status for args, row in ended.items()} == {
        "2": "failed", "3": "failed", "4": "failed", "5": "failed", "6": "oom",
    }  # fmt: skip
    reasons = ("ended by SIGKILL", "exit status 3", "hung: no answer for 3 s", "ended by SIGSEGV", "memory")
    for args, said in zip("23456", reasons, strict=True):
        assert said in ended[args].reason
    # Everything behind the points that died was measured: the same kinds elsewhere, and the last kind.
    assert {rows["Z", args, 256].status for args in "123456"} == {"ok"}
    assert rows["Z", "1", 64].status == "ok"
    # A resumed sweep tries the failed points again, and only those.
    again = prepare(TINY, ["Z2", "Z3", "Z4", "Z5", "Z6", "Z1"], db=tmp_path / "db", **ASKED)
    assert {(point.block, point.context) for point in again.points} == {(f"Z{i}", 64) for i in (2, 3, 4, 5)}


def test_a_block_that_always_dies_is_given_up(dangerous, tmp_path, monkeypatch):
    todo = prepare(TINY, ["Z3"], db=tmp_path, **(ASKED | {"contexts": [64], "batches": [1, 2, 3, 4, 5]}))
    started = []
    real = Worker._start
    monkeypatch.setattr(Worker, "_start", lambda self: (started.append(1), real(self)))
    worker = Worker(todo.machine, todo.bench, 10.0)
    try:
        rows = [worker.measure(point, todo.machine.budget) for point in todo.points if point.block == "Z3"]
    finally:
        worker.close()
    assert len(started) == worker_module.DEATHS
    assert [row.status for row in rows] == ["failed"] * 5
    assert rows[-1].reason == "not tried: 3 points of this block before it ended so"


def test_endings():
    assert _ending(-9, True) == "oom killed by the system, which was out of memory"
    assert _ending(-9, False).startswith("failed ")
    assert _ending(1, True) == "failed the measuring process ended with exit status 1"
    assert _oom_kills() >= 0


def start_profile(db: Path, *more: str) -> subprocess.Popen:
    """The command itself, in a session of its own, so that signals reach what a terminal's would."""
    command = "-m nasbench profile --model smollm2-135m --blocks W --contexts 64,128 --batches 1 --modes decode"
    arguments = [
        sys.executable,
        *command.split(),
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--budget",
        "0.1",
        "--db",
        str(db),
        *more,
    ]
    # Two processes of as many threads as cores each would wait for one another most of the time.
    environment = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def rows_when(db: Path, count: int, process: subprocess.Popen) -> Path:
    """Waits until the database has so many rows."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in db.glob("*.csv"):
            if len(read_db(path)) >= count:
                return path
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("no rows")


def others_of(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def nobody_left(session: int) -> bool:
    deadline = time.monotonic() + 20
    while others_of(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_sweep_keeps_its_rows_leaves_nobody_behind_and_goes_on(tmp_path, how, code):
    process = start_profile(tmp_path)
    path = rows_when(tmp_path, 6, process)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    if how == signal.SIGINT:
        assert "and the same command continues from here" in said
        assert "Traceback" not in said
    assert nobody_left(process.pid)
    kept = read_db(path)
    assert len(kept) >= 6
    process = start_profile(tmp_path, "--json")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f'"skipped": {len(kept) - 4}' in out
    whole = read_db(path)
    assert len(whole) == 4 + 4 + 2 * 2  # ceilings, shared blocks, A and W at two contexts
    assert set(kept) - set(whole) <= {row for row in kept if row.block == "ceiling"}


def test_two_sweeps_at_once_lose_nothing(tmp_path):
    processes = [start_profile(tmp_path), start_profile(tmp_path, "--dtype", "bf16")]
    for process in processes:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    (path,) = tmp_path.glob("*.csv")
    rows = read_db(path)
    for dtype in ("fp32", "bf16"):
        assert len([row for row in rows if row.dtype == dtype and row.block != "ceiling"]) == 8
    assert {row.status for row in rows} == {"ok"}


def test_the_next_groups_child_starts_while_this_one_measures(tmp_path):
    """As on a GPU, without one: the points fail, the processes come and go all the same."""
    todo = prepare(TINY, "A", db=tmp_path, **ASKED)
    todo.machine.info = replace(todo.machine.info, kind="cuda")
    worker = Worker(todo.machine, todo.bench, 60.0)
    point = todo.points[-1]
    try:
        assert worker.measure(point, todo.machine.budget).status == "failed"
        worker.start_ahead()
        worker.start_ahead()
        assert worker._ahead is not None
        first, ahead = worker._process, worker._ahead[0]
        worker.new_group()
        assert not first.is_alive()
        assert worker.measure(point, todo.machine.budget).status == "failed"
        assert worker._process is ahead
        worker.start_ahead()
        children = [worker._process, worker._ahead[0]]
    finally:
        worker.close()
    assert not any(child.is_alive() for child in children)


def test_ctrl_c_waits_until_a_child_is_begun():
    steps = []

    def begin():
        with _uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            steps.append("begun")
        steps.append("beyond")

    # A suite in the background of a shell ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            begin()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == ["begun"]
