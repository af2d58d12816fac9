"""Files and texts that people and other programs write, damaged at random: every one is read, or refused by one line.

A hundred cases of each reader here, 2,000 with `-m slow`.
"""

import json
import os
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nasbench.cli.search_command import parse_counts
from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import read_json
from nasbench.core.sizes import parse_budget, parse_sizes
from nasbench.data.text import read_documents
from nasbench.evaluation.suite import read_items
from nasbench.evaluation.tasks import parse_tasks
from nasbench.model.shapes import MODELS
from nasbench.pipeline import State, plan, read_recipe
from nasbench.profiling.plan import parse_batches
from nasbench.runs import Run
from nasbench.search.objective import parse_objective
from nasbench.spaces.placement import format_placement, parse_placement
from nasbench.supernet import checkpoint
from nasbench.supernet.settings import DistillConfig

RUN = json.dumps({"model": "default", "names": ["A", "W256", "J"], "num_layers": 30, "data": "", "sequence": 256})
OPTIONS = json.dumps({"context": "8k", "batch": "4"})
LATEST = json.dumps({"checkpoint": "done-00000000"})
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


READERS = {
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
    check(name, tmp_path, 20 if name == "tasks" else 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_text_is_read_or_refused_2000_times(name, tmp_path):
    check(name, tmp_path, int(os.environ.get("FUZZ_CASES", "2000")))
