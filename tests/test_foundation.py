"""Errors, registry, sizes, files and run folders: what every stage stands on."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasbench.core import registry as registry_module
from nasbench.core.errors import MachineError, UserError, unknown
from nasbench.core.files import atomic_path, read_json, write_json, write_text
from nasbench.core.registry import Registry
from nasbench.core.sizes import format_size, parse_size, parse_sizes
from nasbench.runs import Run, RunSpec


def test_unknown_names_value_legal_and_nearest():
    message = str(unknown("model", "qwen3-1.7", ["qwen3-1.7b", "smollm2-135m"]))
    assert "'qwen3-1.7'" in message
    assert "smollm2-135m" in message
    assert "did you mean 'qwen3-1.7b'?" in message


@pytest.mark.parametrize(
    ("text", "value"), [("4k", 4096), ("256K", 262144), ("64MiB", 64 << 20), ("7", 7), ("1.5k", 1536)]
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "0", "-4k", "4x", "k", "1.3", "4 k k", "1e3"])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="bad size"):
        parse_size(text)


@given(st.integers(1, 1 << 30))
def test_format_size_is_the_inverse(value):
    assert parse_size(format_size(value)) == value


def test_parse_sizes_sorts_without_repeats():
    assert parse_sizes("64k, 4k,65536") == [4096, 65536]


def test_registry_reads_entry_points_once_and_reports_broken_ones(monkeypatch):
    points = [EntryPoint("sep", "os:sep", "nasbench.test")]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    table: Registry[str] = Registry("thing", group="nasbench.test")
    table.register("own", "x")
    assert table["own"] == "x"
    assert table["sep"] == os.sep
    with pytest.raises(UserError, match=r"unknown thing 'sop'.*did you mean 'sep'"):
        table["sop"]
    with pytest.raises(UserError, match="already registered"):
        table.register("own", "y")

    broken: Registry[str] = Registry("thing", group="nasbench.test")
    points[:] = [EntryPoint("bad", "no_such_module_at_all:x", "nasbench.test")]
    with pytest.raises(UserError, match="entry point 'bad'"):
        list(broken)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic_path(path) as temporary:  # noqa: PT012  (the writer fails half-way)
        temporary.write_text("half")
        raise KeyError
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MachineError, match="no space left on the disk"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"writing .*file/x"):
        write_text(tmp_path / "file" / "x", "new")


def test_bad_json_names_the_file(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is not valid JSON"):
        read_json(tmp_path / "run.json")


def test_a_run_opens_only_as_what_it_is(tmp_path):
    spec = RunSpec(model="default", names=("A", "W", "J"), num_layers=30)
    run = Run.create(tmp_path / "r", spec)
    assert Run.open(run.path).spec == spec
    assert Run.create(run.path, spec) == run
    assert run.spec.space.num_layers == 30
    with pytest.raises(UserError, match="another seed 0 \\(asked: 1\\)"):
        Run.create(run.path, RunSpec(model="default", names=("A", "W", "J"), num_layers=30, seed=1))
    with pytest.raises(UserError, match="not a run folder"):
        Run.open(tmp_path)


def test_help_answers_at_once():
    command = [sys.executable, "-m", "nasbench", "--help"]
    seconds = []
    # A busy machine is slow at times; slow code always.
    while len(seconds) < 12 and min(seconds, default=1.0) >= 0.5:
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert "quickstart" in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        (
            "from nasbench.cli.main import run; run(['--help'])",
            ("torch", "pandas", "optuna", "matplotlib", "transformers", "pyarrow"),
        ),
        # Every measuring process and every command would pay seconds for them.
        (
            "import nasbench.model.mixers.attention.mixer, nasbench.supernet.train, nasbench.search.measuring",
            ("torch._dynamo", "torch.distributed.tensor"),
        ),
    ],
)
def test_what_is_heavy_waits_until_it_is_needed(code, heavy):
    code += f"\nimport sys; sys.exit(', '.join(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
