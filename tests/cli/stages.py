"""Every stage that writes files, over a tiny model, and a server that starts them and does them harm.

Fixtures for the tests of faults, which import them.
"""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from made_up_rows import profile_rows

from nasbench.devices import detect
from nasbench.store import Database
from nasbench.supernet import checkpoint

SERVER = """
import ctypes, importlib, json, os, resource, signal, sys, time
import torch
torch.set_num_threads(1)
from nasbench.cli.main import run
import nasbench.core.files as files
import matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, matplotlib.figure, optuna, pandas
libc = ctypes.CDLL(None, use_errno=True)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
flush = files.flush
def slowly(path):
    time.sleep(0.01)
    flush(path)
def powerless():
    # A process of the superuser writes where nobody may, as long as it has the capabilities.
    if os.geteuid() == 0:
        assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
def child(asked, told):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(told, 2)
    if asked["delay"] is not None:
        files.flush = slowly
    if asked["powerless"]:
        powerless()
    if asked["bytes"] is not None:
        if asked["torn"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["bytes"],) * 2)
    try:
        code = run(asked["words"])
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    if asked["learn"]:
        print("modules", *(name for name in sys.modules if name.startswith("nasbench.")), file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)
for line in sys.stdin:
    asked, began, waiting = json.loads(line), time.monotonic(), {}
    for number in range(asked["copies"]):
        read, told = os.pipe()
        process = os.fork()
        if not process:
            os.setpgid(0, 0)
            child(asked, told)
        os.close(told)
        waiting[process] = read
    if asked["delay"] is not None:
        (process,) = waiting
        ended = 0
        while not ended and time.monotonic() - began < asked["delay"]:
            ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            time.sleep(0.002)
        if not ended:
            os.kill(process, signal.SIGKILL)
    found = []
    for process, read in waiting.items():
        with open(read, errors="replace") as text:
            said = text.read()
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if asked["learn"]:  # later children need not import them
            for name in said.rpartition("modules ")[2].split():
                importlib.import_module(name)
        found.append([code, [part for part in said.splitlines() if part.startswith(("nasbench:", "Traceback"))], said])
    print(json.dumps([found, time.monotonic() - began]), flush=True)
"""


@dataclass(frozen=True)
class End:
    """How a command ended: its exit code, its errors and tracebacks, all it said, and its seconds."""

    code: int
    errors: list[str]
    said: str
    seconds: float

    @property
    def refused(self):
        """Whether it ended with one line that says why."""
        return self.code in (1, 2) and len(self.errors) == 1 and self.errors[0].startswith("nasbench:")


@pytest.fixture(scope="module")
def server():
    """call(words, **harm) -> End; a list of them with `copies` at once.

    delay: killed after so many seconds. bytes: no file may become longer, torn: and who tries is killed within the
    write. powerless: without the superuser's powers.
    """
    child = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    usual = {"delay": None, "bytes": None, "torn": False, "powerless": False, "copies": 1, "learn": False}

    def call(words, **harm):
        child.stdin.write(json.dumps({**usual, "words": [str(word) for word in words], **harm}) + "\n")
        child.stdin.flush()
        found, seconds = json.loads(child.stdout.readline())
        ends = [End(*each, seconds) for each in found]
        return ends if "copies" in harm else ends[0]

    yield call
    child.stdin.close()
    child.wait()


def names(folder):
    """Every file of a folder, hidden ones among them, but locks and logs of TensorBoard."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(".lock"))


def table(path, *without):
    rows = list(csv.DictReader(path.open()))
    return sorted(json.dumps({key: value for key, value in row.items() if key not in without}) for row in rows)


def weights(folder):
    return {path.relative_to(folder).as_posix(): checkpoint.digest(path) for path in folder.rglob("*.safetensors")}


def losses(path):
    """Without the speed."""
    return table(path, "tok_s", "seconds") if path.is_file() else None


def scores(run):
    """The newest score of every key that nothing but `eval` measures, without times and versions."""
    lines = [json.loads(line) for line in (run / "scores" / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("about")
    names = ("weights", "placement", "task", "settings", "dtype")
    return {tuple(line[name] for name in names): line for line in lines if line["task"].startswith("retrieval")}


def trials(path):
    return table(path, "seconds", "created_utc")


@dataclass(frozen=True)
class Stage:
    """words(run, given): its command line. result(run): what it made, as far as that must be the same every time."""

    words: Any
    result: Any


DISTILL = ("--sequence", "32", "--align-tokens", "1k", "--supernet-tokens", "512", "--device", "cpu", "--dtype", "fp32")
SEARCH = ("--evaluations", "12", "--context", "256", "--batch", "1", "--search-tokens", "256", "--test-tokens", "256")
STAGES = {
    "corpus": Stage(
        lambda run, given: [
            *("corpus", "generate", "--model", given["model"], "--out", run / "own.jsonl", "--tokens", "3k"),
            *("--length", "48", "--batch", "8", "--device", "cpu", "--dtype", "fp32"),
        ],
        lambda run: (run / "own.jsonl").read_text(),
    ),
    "distill": Stage(
        lambda run, given: [
            *("distill", "--model", given["model"], "--data", given["data"], "--out", run, "--blocks", "W8 J"),
            *("--config", given["settings"], *DISTILL),
        ],
        lambda run: [weights(run), losses(run / "supernet" / "losses.csv")],
    ),
    "search": Stage(
        lambda run, given: [
            *("search", run, "-k", "1,2", "--profile", given["device"], "--db", given["db"], "--device", "cpu"),
            *SEARCH,
        ],
        lambda run: [trials(run / "trials.csv"), trials(run / "front.csv")],
    ),
    "optuna": Stage(
        lambda run, given: ["search", run, "--strategy", "optuna", "--device", "cpu", *SEARCH],
        # A killed trial is asked again, and what is drawn after it differs.
        lambda run: sum('"strategy": "optuna"' in row for row in trials(run / "trials.csv")) >= 12,
    ),
    "validate": Stage(
        lambda run, given: ["validate", run, "--placements", "3", "--device", "cpu"],
        lambda run: [json.loads(row)["placement"] for row in table(run / "validation.csv")],
    ),
    "eval": Stage(
        lambda run, given: [
            *("eval", run, "--placements", "searched", "--tasks", "loss,kl,retrieval@96:4", "--device", "cpu"),
        ],
        scores,
    ),
    "finalize": Stage(
        lambda run, given: ["finalize", run, "-k", "1", "--tokens", "1k", "--average", "0.5", "--device", "cpu"],
        lambda run: weights(run / "final"),
    ),
    "report": Stage(
        lambda run, given: ["report", run],
        lambda run: [path.stat().st_size > 0 for path in sorted((run / "report").rglob("*")) if path.is_file()],
    ),
    "export": Stage(
        lambda run, given: ["export", run, "--placement", "2W J A", "--out", run / "out"],
        lambda run: weights(run / "out"),
    ),
    "profile": Stage(
        lambda run, given: [
            *("profile", "--model", given["model"], "--blocks", "W8 J", "--contexts", "64", "--batches", "1"),
            *("--budget", "0.02", "--in-process", "--calibrate", "--db", run / "measured", "--device", "cpu"),
            *("--dtype", "fp32", "--chunk", "32"),
        ],
        lambda run: {
            path.name: [[json.loads(row).get(name) for name in ("block", "args", "mode", "context", "status")]
                        for row in table(path)]
            for path in sorted((run / "measured").rglob("*.csv"))
        },
    ),
    "merge": Stage(
        lambda run, given: ["db", "merge", given["db"], "--db", run / "merged"],
        lambda run: {path.name: path.read_text() for path in sorted((run / "merged").glob("*.csv"))},
    ),
    "recipe": Stage(
        lambda run, given: ["run", given["recipe"], "--out", run / "recipe", "--device", "cpu"],
        lambda run: [weights(run / "recipe"), trials(run / "recipe" / "trials.csv")],
    ),
}  # fmt: skip
"""In the order in which a person runs them; each finds what those before it made."""

RECIPE = """
title = "distil, search and report"
[settings]
model = "{model}"
data = "{data}"
dtype = "fp32"
[training]
ridge_tokens = 512
align_batch_tokens = 128
supernet_batch_tokens = 128
[[stage]]
title = "distill"
command = "distill --model {{model}} --data {{data}} --out {{out}} --blocks W8 --sequence 32 --align-tokens 512 \
--supernet-tokens 256 --config {{training}} --device {{device}} --dtype fp32"
[[stage]]
title = "search"
command = "search {{out}} -k 1 --profile {device} --db {db} {search}"
makes = "{{out}}/front.csv"
[[stage]]
title = "report"
command = "report {{out}}"
makes = "{{out}}/report/index.html"
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model, text_file):
    """What the stages are given: model, text, settings, a database of this device, a recipe, a folder."""
    folder, device = tmp_path_factory.mktemp("faults"), detect("cpu").slug
    settings, recipe = folder / "settings.toml", folder / "tiny.toml"
    settings.write_text(
        "ridge_tokens = 512\nalign_batch_tokens = 128\nsupernet_batch_tokens = 128\ncheckpoint_every_s = 0.0\n"
    )
    Database(folder / "db" / f"{device}.csv").merge(profile_rows(device=device))
    found = {"model": tiny_model, "data": text_file, "device": device, "db": folder / "db", "search": " ".join(SEARCH)}
    recipe.write_text(RECIPE.format(**found))
    return {**found, "settings": settings, "recipe": recipe, "folder": folder}


@pytest.fixture(scope="module")
def run(given):
    """The folder that every stage writes to: always the same path, since a report says where its run lies."""
    return given["folder"] / "undisturbed" / "run"


@pytest.fixture(scope="module")
def whole(given, server, run):
    """call(stage) -> (folder before it, folder after it, seconds), undisturbed; it makes the stages before, too."""
    found = {}

    def upto(stage):
        for name, each in STAGES.items():
            if name not in found:
                previous = list(found.values())[-1][1] if found else None
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(previous, run) if previous else run.mkdir(parents=True)
                before, after = (given["folder"] / f"{when}-{name}" for when in ("before", "after"))
                shutil.copytree(run, before)
                end = server(each.words(run, given), learn=True)
                assert end.code == 0, (name, end.said)
                shutil.copytree(run, after)
                found[name] = (before, after, end.seconds)
            if name == stage:
                return found[name]
        raise KeyError(stage)

    return upto


def written(before, after):
    """Name -> size of every file that a stage wrote or changed."""
    changed = {}
    for name in names(after):
        old, new = before / name, after / name
        if not old.is_file() or old.read_bytes() != new.read_bytes():
            changed[name] = new.stat().st_size
    return changed


def restore(run, before):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(before, run)


def check_whole(run, after, result):
    """Everything is there as in the undisturbed run, and nothing else."""
    assert names(run) == names(after)
    assert names(run.parent) == [f"{run.name}/{name}" for name in names(run)]
    assert result(run) == result(after)
