"""Files and texts that people and other programs write, damaged at random: every one is read, or refused by one line.

A hundred cases of each reader here, 2,000 with `-m slow`.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_rows import profile_rows

from nasbench.cli.common import parse_kinds
from nasbench.cli.eval_many import _share, helper_devices
from nasbench.cli.finalize_command import _share_of
from nasbench.cli.search_command import parse_counts
from nasbench.cli.training_options import training_settings
from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import read_json
from nasbench.core.sizes import parse_budget, parse_sizes
from nasbench.data.self_corpus import Writing, _read_partial
from nasbench.data.text import read_documents
from nasbench.evaluation.old_scores import read_old_scores
from nasbench.evaluation.scores import ScoreStore
from nasbench.evaluation.suite import read_items
from nasbench.evaluation.tasks import parse_tasks
from nasbench.model.shapes import MODELS
from nasbench.pipeline import State, plan, read_recipe
from nasbench.profiling.plan import parse_batches
from nasbench.report import facts
from nasbench.runs import Run
from nasbench.search.limits import parse_limit
from nasbench.search.objective import parse_objective
from nasbench.search.trials import FrontRow, Target, TrialRow, read_front, read_trials
from nasbench.search.validation import ValidationRow, read_validation
from nasbench.spaces.placement import format_placement, parse_placement
from nasbench.store import Database, Row, read_db
from nasbench.supernet import checkpoint
from nasbench.supernet.budget import Budget, FinalBudget, final_history
from nasbench.supernet.loop import last_speed
from nasbench.supernet.settings import DistillConfig

RUN = json.dumps({"model": "default", "names": ["A", "W256", "J"], "num_layers": 30, "data": "", "sequence": 256})
OPTIONS = json.dumps({"context": "8k", "batch": "4"})
LATEST = json.dumps({"checkpoint": "done-00000000"})
BUDGET = json.dumps({"align": {"batch_tokens": 256, "tok_s": 9.5, "seconds": 3.0, "tokens": 512, "graphs": False}})
FINAL_BUDGET = json.dumps({"supernet": "v", "spent": 1.5, "tok_s": 9.5, "tokens": {"3": 512}, "done": 512})
EVALS = (
    "version,placement,task,detail,dtype,metric,higher_is_better,value,stderr,n\n"
    "v,2W8 J A,kl,search/8x32,float32,nats,0,0.5,0.01,256\n"
)
ITEMS = json.dumps(
    {"measure": "kl", "weights": "supernet", "values": [0.5, 1.0], "version": "v", "placement": "4A", "time": 1.0}
)
SAMPLES = json.dumps(
    {
        "weights": "v", "placement": "4A", "task": "kl", "settings": "test/8x32", "dtype": "float32", "metric": "nats",
        "higher_is_better": False, "samples": [0.5, 0.25], "about": {"utc": "2026-01-01"},
    }
)  # fmt: skip
CORPUS = json.dumps({"text": "some text", "source": "tiny", "tokens": 20, "batch": 3})
PROGRESS = "stage,step,tokens,seconds,tok_s,lr,skipped\nalign,10,2560,1.5,1706,0.001,0\n"
LOSSES = "stage,step,tokens,layer,name,loss\nalign,1,32,0,J,0.5\n"
TARGET = Target("test-device", 256, 1, "bf16")
STATE = json.dumps({"stage": "done", "step": 0, "digests": {"supernet.safetensors": "ab"}, "moments": {"a": "b"}})
RECIPE = (
    'title = "x"\n[settings]\nblocks = "W J"\nflags = ["--a"]\ncounts = "1,2"\n[settings.cpu]\nblocks = "J"\n'
    '[budget]\ntokens = "16k"\nevaluations = 40\nseconds = 30.0\n[training]\nwhole = true\n'
    '[[stage]]\ntitle = "a {blocks}"\ncommand = "a {flags} --b {tokens} --c {each} {evaluations}"\neach = "counts"\n'
    'makes = "{out}/x"\nseconds = ["seconds"]\n[[stage]]\ntitle = "b"\ncommand = "b"\nseconds = { cpu = 5 }\n'
)
SETTINGS = 'align_tokens = 1024\nfrozen = ["W"]\nwhole = true\nalign_lr = 1e-3\nfull_schedule = "uniform"\n'
SUITE = "\n".join(
    json.dumps(item)
    for item in (
        {"query": "a", "choices": ["b", "c"], "gold": 0},
        {"prefixes": ["a", "b"], "suffix": "c", "gold": 1},
        {"query": "a", "answers": ["b"]},
    )
)
TEXTS = "\n".join(json.dumps({"text": f"some text {i}"}) for i in range(3))
ODD = (
    *("NaN", "Infinity", "-Infinity", "1e999", "null", "true", "-1", "0", "1.5", '""', "[]", "{}", "[[]]", '"\\ud800"'),
    *("9" * 400, "9" * 5000, '"../../x"', "\x00", "é", "{", "}", "[", '"', "\n", "\\", "@", ":", "x" * 300, "[" * 2000),
    *('{"a": NaN}', "_", "'", '"""', "inf", "nan", "1979-05-27", "0x10", "{}{}", "{0}", "{blocks.x}", "{blocks[0]}"),
)


def damaged(text):
    """The text with a few of its parts cut out, doubled or replaced."""
    at = st.integers(0, len(text))
    change = st.tuples(at, st.integers(0, 12), st.sampled_from(ODD) | st.text(max_size=8))

    def apply(changes):
        found = text
        for begin, length, new in changes:
            found = found[:begin] + new + found[begin + length :]
        return found

    return st.lists(change, max_size=4).map(apply)


def swapped(text):
    """JSON with one of its values replaced, where the text alone would hardly stay JSON."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    )
    keys = st.sampled_from([*json.loads(text), "new"])
    return st.tuples(keys, values).map(lambda pair: json.dumps({**json.loads(text), pair[0]: pair[1]})) | values.map(
        json.dumps
    )


def words(alphabet):
    return st.text(st.sampled_from(alphabet), max_size=24) | st.text(max_size=12) | st.just("9" * 5000 + "A")


def open_run(folder, text):
    write(folder / "run.json", text)
    run = Run.open(folder)
    assert run.spec.space.num_layers == run.spec.num_layers


def recall(folder, text):
    write(folder / "run.json", RUN)
    write(folder / "options.json", text)
    Run.open(folder).recall(context="")


def latest(folder, text):
    write(folder / "latest.json", text)
    found = checkpoint.latest(folder)
    assert found.folder.parent == folder


def state(folder, text):
    write(folder / "latest.json", LATEST)
    write(folder / "done-00000000" / "state.json", text)
    checkpoint.latest(folder)


def recipe(folder, text):
    write(folder / "mine.toml", text)
    found = read_recipe(str(folder / "mine.toml"))
    plan(found, found.values("cpu", {}) | {"out": "o", "device": "cpu"})


def pipeline(folder, text):
    write(folder / "pipeline.json", text)
    State(folder)


def of_file(name, read):
    def check(folder, text):
        write(folder / name, text)
        read(folder / name)

    return check


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def placement(folder, text):
    found = parse_placement(text)
    assert parse_placement(format_placement(found)) == found
    MODELS["qwen2.5-1.5b"].parse(text)


def distillation(folder, text):
    write(folder / "supernet" / "budget.json", text)
    run = SimpleNamespace(supernet=folder / "supernet", spec=SimpleNamespace(sequence=32))
    budget = Budget(run, DistillConfig(), None, None, "cpu", lambda told: None)
    budget._largest_step = lambda stage: {"batch_tokens": 256, "tok_s": 1.0}
    budget.settings({"align": 5.0})


def finalisation(folder, text):
    write(folder / "budget.json", text)
    FinalBudget(folder, "v", 1.0, 128).tokens(7.0)


def corpus(folder, text):
    write(folder / "partial", json.dumps(asdict(Writing("tiny"))) + "\n" + text)
    _read_partial(folder / "partial", Writing("tiny"))


def limit(folder, text):
    if not (folder / "db").is_dir():
        Database(folder / "db" / "test-device.csv").merge(profile_rows())
    parse_limit(text, True, TARGET, folder / "db")


def of_folder(name, read):
    """A reader that is given the file's folder."""
    return of_file(name, lambda path: read(path.parent))


def table(row):
    """A table of a dataclass with a row of ones."""
    columns = list(row.__dataclass_fields__)
    return damaged(",".join(columns) + "\n" + ",".join("1" for _ in columns) + "\n")


READERS = {
    "budget.json": (distillation, damaged(BUDGET) | swapped(BUDGET)),
    "final budget.json": (finalisation, damaged(FINAL_BUDGET) | swapped(FINAL_BUDGET)),
    "history.json": (of_folder("history.json", final_history), damaged('{"v": 512}') | swapped('{"v": 512}')),
    "evals.csv": (of_folder("evals.csv", read_old_scores), damaged(EVALS)),
    "items.jsonl": (of_folder("items.jsonl", read_old_scores), damaged(ITEMS) | swapped(ITEMS)),
    "samples.jsonl": (of_folder("samples.jsonl", lambda path: ScoreStore(path).table()), damaged(SAMPLES + "\n")),
    "a sample": (
        of_folder("samples.jsonl", lambda path: ScoreStore(path).table()),
        swapped(SAMPLES).map("{}\n".format),
    ),
    "corpus": (corpus, damaged(CORPUS) | swapped(CORPUS)),
    "progress.csv": (of_folder("progress.csv", lambda path: last_speed(path, "align")), damaged(PROGRESS)),
    "losses.csv": (of_file("losses.csv", facts._training), damaged(LOSSES)),
    "trials.csv": (of_file("trials.csv", read_trials), table(TrialRow)),
    "front.csv": (of_file("front.csv", read_front), table(FrontRow)),
    "validation.csv": (of_file("validation.csv", read_validation), table(ValidationRow)),
    "profile": (of_file("test-device.csv", read_db), table(Row)),
    "limit": (limit, damaged("cache=64MiB@64k") | damaged("ttft_ms=8@test-device,3k+2,1") | damaged("kl=0.02")),
    "set": (
        lambda folder, text: training_settings(folder, "cpu", None, [text], "fp32", {}),
        damaged("align_tokens = 1024") | damaged('frozen = ["W"]'),
    ),
    "kinds": (lambda _, text: parse_kinds(text, MODELS["qwen2.5-1.5b"]), words("0123456789AWJGM@x. ,-")),
    "share": (lambda _, text: _share(text), words("0123456789/-k ")),
    "average": (lambda _, text: _share_of(text), words("0123456789.-aunto ")),
    "workers": (lambda _, text: helper_devices(text, "cpu"), words("cpuda:,0123456789")),
    "run.json": (open_run, damaged(RUN) | swapped(RUN)),
    "options.json": (recall, damaged(OPTIONS) | swapped(OPTIONS)),
    "latest.json": (latest, damaged(LATEST) | swapped(LATEST)),
    "state.json": (state, damaged(STATE) | swapped(STATE)),
    "pipeline.json": (pipeline, damaged('{"recipe": "x", "stages": {}}')),
    "json": (of_file("x.json", read_json), damaged(RUN)),
    "recipe": (recipe, damaged(RECIPE)),
    "settings": (of_file("x.toml", DistillConfig.read), damaged(SETTINGS)),
    "suite": (of_file("x.jsonl", read_items), damaged(SUITE)),
    "texts": (of_file("t.jsonl", lambda path: read_documents(str(path))), damaged(TEXTS)),
    "placement": (placement, words("0123456789AWJG@x. ,-")),
    "sizes": (lambda _, text: parse_sizes(text), words("0123456789kKmMiBbg., -eE")),
    "budget": (lambda _, text: parse_budget(text), words("0123456789kKmMiBbg.-eE")),
    "batches": (lambda _, text: parse_batches(text), words("0123456789kmax,auto-")),
    "counts": (lambda _, text: parse_counts(text), words("0123456789,k -")),
    "tasks": (lambda _, text: parse_tasks(text), damaged("loss,kl,retrieval@512:8,agreement@6,suite@3:x.jsonl,mc:y")),
    "objective": (lambda _, text: parse_objective(text), damaged("kl+0.5*retrieval-kl@2k:64")),
}


def check(name, folder, cases):
    read, texts = READERS[name]

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=cases < 1000,
    )
    @given(texts)
    def every(text):
        with suppress(UserError, MachineError):
            read(folder, text)

    every()


@pytest.mark.parametrize("name", READERS)
def test_every_text_is_read_or_refused(name, tmp_path):
    # An unknown task is looked up among lm-evaluation-harness's, which takes a fifth of a second.
    check(name, tmp_path, 15 if name in ("tasks", "objective", "limit") else 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_text_is_read_or_refused_2000_times(name, tmp_path):
    check(name, tmp_path, int(os.environ.get("FUZZ_CASES", "2000")))
