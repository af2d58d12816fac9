"""Every stage, killed at random moments and started again: the result is that of an undisturbed run, and nothing is
left behind.

`KILLS=50 pytest -m slow tests/cli/test_kills.py` kills every stage 50 times; 6 times by default. Writes are made to
take longer, so that about half of the kills fall into one.
"""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from made_up_rows import profile_rows
from supernet_tiny import one_thread, text_file, tiny_model

from nasbench.store import Database
from nasbench.supernet import checkpoint

__all__ = ["one_thread", "text_file", "tiny_model"]

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "6"))
SERVER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from nasbench.cli.main import run
import nasbench.core.files as files
import nasbench.export, nasbench.report.html, nasbench.search.run_folder, nasbench.supernet.budget
import nasbench.evaluation.evaluator, nasbench.data.self_corpus
flush = files.flush
def slowly(path):
    time.sleep(0.01)
    flush(path)
for line in sys.stdin:
    words, delay = json.loads(line)
    child = os.fork()
    if not child:
        files.flush = slowly if delay is not None else flush
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        if delay is not None:
            os.dup2(out, 2)
        os._exit(run(words))
    began, ended = time.monotonic(), 0
    while not ended and (delay is None or time.monotonic() - began < delay):
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """call(words, delay=None) -> (exit code, seconds) of a command, killed after `delay`."""
    child = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(words, delay=None):
        child.stdin.write(json.dumps([[str(word) for word in words], delay]) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())

    yield call
    child.stdin.close()
    child.wait()


def names(folder):
    """Every file of a folder, hidden ones among them, but locks."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(".lock"))


def table(path, *without):
    rows = list(csv.DictReader(path.open()))
    return sorted(json.dumps({key: value for key, value in row.items() if key not in without}) for row in rows)


def weights(folder):
    return {path.relative_to(folder).as_posix(): checkpoint.digest(path) for path in folder.rglob("*.safetensors")}


STAGES = {
    "distill": (
        lambda run, given: [
            *("distill", "--model", given["model"], "--data", given["data"], "--out", run, "--blocks", "W8 J"),
            *("--sequence", "32", "--align-tokens", "1k", "--supernet-tokens", "512", "--config", given["settings"]),
            *("--device", "cpu", "--dtype", "fp32"),
        ],
        lambda run: [weights(run), (run / "supernet" / "losses.csv").read_text()],
    ),
    "search": (
        lambda run, given: [
            *("search", run, "-k", "1,2", "--evaluations", "12", "--profile", "test-device", "--db", given["db"]),
            *("--context", "256", "--batch", "1", "--search-tokens", "256", "--test-tokens", "256", "--device", "cpu"),
        ],
        lambda run: [
            table(run / "trials.csv", "seconds", "created_utc"),
            table(run / "front.csv", "seconds", "created_utc"),
        ],
    ),
    "eval": (
        lambda run, given: [
            "eval",
            run,
            "--placements",
            "searched",
            "--tasks",
            "loss,kl,retrieval@96:4",
            "--device",
            "cpu",
        ],
        lambda run: [path.stat().st_size > 0 for path in sorted((run / "scores").rglob("*.csv"))],
    ),
    "finalize": (
        lambda run, given: ["finalize", run, "-k", "1", "--tokens", "1k", "--device", "cpu"],
        lambda run: weights(run / "final"),
    ),
    "report": (lambda run, given: ["report", run, "--db", given["db"]], lambda run: True),
    "export": (
        lambda run, given: ["export", run, "--placement", "2W J A", "--out", run / "out"],
        lambda run: weights(run / "out"),
    ),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model, text_file):
    folder = tmp_path_factory.mktemp("kills")
    settings = folder / "settings.toml"
    settings.write_text(
        "ridge_tokens = 512\nalign_batch_tokens = 128\nsupernet_batch_tokens = 128\ncheckpoint_every_s = 0.0\n"
    )
    Database(folder / "db" / "test-device.csv").merge(profile_rows())
    return {"model": tiny_model, "data": text_file, "settings": settings, "db": folder / "db", "folder": folder}


@pytest.fixture(scope="module")
def whole(given, server):
    """call(stage) -> (folder before it, folder after it, seconds), undisturbed; it makes the stages before, too."""
    found, run = {}, given["folder"] / "undisturbed" / "run"

    def upto(stage):
        for name, (words, _) in STAGES.items():
            if name not in found:
                previous = list(found.values())[-1][1] if found else None
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(previous, run) if previous else run.mkdir(parents=True)
                before, after = (given["folder"] / f"{when}-{name}" for when in ("before", "after"))
                shutil.copytree(run, before)
                code, seconds = server(words(run, given))
                assert code == 0, name
                shutil.copytree(run, after)
                found[name] = (before, after, seconds)
            if name == stage:
                return found[name]
        raise KeyError(stage)

    return upto


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_kills_change_nothing(stage, given, whole, server):
    words, result = STAGES[stage]
    before, after, seconds = whole(stage)
    draw, run, killed, began = random.Random(stage), given["folder"] / "undisturbed" / "run", 0, time.monotonic()
    expected = result(after)
    while killed < KILLS and time.monotonic() - began < 3000:
        # The same path: a report says where its run lies.
        shutil.rmtree(run)
        shutil.copytree(before, run)
        for _ in range(draw.randint(1, 3)):
            code, _ = server(words(run, given), draw.uniform(0.0, 1.2 * seconds))
            killed += code == -9
            if code == 0:
                break
        assert server(words(run, given))[0] == 0
        assert names(run) == names(after)
        assert names(run.parent) == [f"run/{name}" for name in names(run)]
        assert result(run) == expected
    assert killed >= KILLS
