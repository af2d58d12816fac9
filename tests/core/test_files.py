"""Locks, what killed writers leave, and names that files give."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import atomic_path, plain_name, sole_writer, sweep, write_json, write_text
from nasbench.core.tables import format_cell

WRITER = """
import sys, time
from pathlib import Path
from nasbench.core.files import atomic_path, sole_writer
with {context} as temporary:
    print("in", flush=True)
    time.sleep(60)
"""


def start(context, *arguments):
    """A process that holds what `context` makes; it has it once it says so."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(context=context), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "in\n"
    return child


@pytest.mark.parametrize("option", ["folder=False", "folder=True", "scratch=True"])
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path, option):
    path = tmp_path / "x.json"
    child = start(f"atomic_path(Path(sys.argv[1]), {option})", path)
    sweep(tmp_path)
    (left,) = tmp_path.iterdir()  # its writer lives
    child.kill()
    child.wait()
    write_text(path, "new")
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
    assert left.name.startswith(".x.json.")


def test_a_folder_appears_whole(tmp_path):
    for text in ("first", "second"):
        with atomic_path(tmp_path / "made", folder=True) as temporary:
            (temporary / "a").write_text(text)
        assert (tmp_path / "made" / "a").read_text() == text
    with pytest.raises(KeyError), atomic_path(tmp_path / "made", folder=True) as temporary:  # noqa: PT012
        (temporary / "a").write_text("third")
        raise KeyError
    assert (tmp_path / "made" / "a").read_text() == "second"
    assert [each.name for each in tmp_path.iterdir()] == ["made"]


def test_a_library_may_write_beside_its_file(tmp_path):
    with atomic_path(tmp_path / "x", scratch=True) as temporary:
        temporary.with_name(".tmpAbCdEf").write_text("its own")
        temporary.write_text("whole")
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "whole"


def test_one_process_writes_a_folder(tmp_path):
    run = tmp_path / "run"
    child = start("sole_writer(Path(sys.argv[1]), 'distills')", run)
    (run / "deep").mkdir()
    (run / "deep" / ".y.csv.abc.tmp").write_text("left by a killed one")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"another process distills in .*run: wait"), sole_writer(run, "distills"):
        pytest.fail("it is not alone")
    assert time.monotonic() - began < 1
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with sole_writer(run, "distills"):
        assert not list((run / "deep").iterdir())
    assert run.is_dir()


def test_a_folder_in_which_nothing_came_to_be_goes(tmp_path):
    with pytest.raises(UserError), sole_writer(tmp_path / "run", "distills"):
        raise UserError("no such data")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", ".hidden", "", "a\0b", "a\nb", 3, None])
def test_names_of_files_are_no_paths(name):
    with pytest.raises(UserError, match="bad device"):
        plain_name("device", name)


def test_what_is_not_finite_reaches_no_file(tmp_path):
    with pytest.raises(MachineError, match=r"x\.json is not finite"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    with pytest.raises(MachineError, match="not finite"):
        format_cell(float("inf"))
    assert not list(tmp_path.iterdir())
    assert plain_name("device", "J@12x96x256-A") == "J@12x96x256-A"
