"""doctor, init, --quiet, --help, and what tells people where the work stands."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from supernet_tiny import one_thread, text_file, tiny_model

from nasbench.cli import common
from nasbench.cli.main import run
from nasbench.core.errors import MachineError, UserError
from nasbench.devices.base import DeviceInfo
from nasbench.pipeline import read_recipe

__all__ = ["one_thread", "text_file", "tiny_model"]


def test_the_doctor_finds_what_is_there(capsys):
    began = time.process_time()
    assert run(["doctor", "--json"]) == 0
    assert time.process_time() - began < 5
    found = json.loads(capsys.readouterr().out)
    names = {each["what"] for each in found["findings"]}
    assert {"cpu", "gpu", "triton", "fla", "pynvml", "memory", "disk here"} <= names
    assert all(each["mend"] or each["state"] != "bad" for each in found["findings"])
    assert run(["doctor"]) == 0
    assert "GiB free" in capsys.readouterr().out


def test_the_doctor_mends_a_gpu_that_torch_cannot_use(capsys, monkeypatch):
    from nasbench.cli import doctor_command

    card = DeviceInfo("nvidia-x", "NVIDIA X", "cuda", 1 << 30, 0, 0, "550.1", "sm_90")
    monkeypatch.setattr("nasbench.devices.detect", lambda name="auto": card)
    (found,) = doctor_command._gpu(False, None)
    assert found.state == "bad"
    assert "this torch has no CUDA" in found.mend
    assert "550.1" in found.mend


def test_init_writes_a_recipe_that_runs(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    assert run(["init", str(path), "--blocks", "W256 J"]) == 0
    assert read_recipe(str(path)).settings["blocks"] == "W256 J"
    assert path.read_text().count("#") > 15
    capsys.readouterr()
    assert run(["run", str(path), "--dry-run", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("\nnasbench ") == 9
    for args, message in [
        ((path,), "exists"),
        ((tmp_path / "x.json",), "a recipe is a .toml"),
        ((tmp_path / "y.toml", "--blocks", "Q"), "unknown layer kind 'Q'"),
        ((tmp_path / "y.toml", "--model", "nothing"), "unknown model"),
    ]:
        assert run(["init", *map(str, args)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "y.toml").exists()


def test_quiet_says_nothing_but_errors(tiny_model, text_file, tmp_path, capsys):
    args = ["distill", "--model", str(tiny_model), "--data", str(text_file), "--blocks", "W8", "--sequence", "32"]
    args += ["--align-tokens", "0", "--supernet-tokens", "0", "--device", "cpu", "--dtype", "fp32", "--quiet"]
    assert run([*args, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr() == ("", "")
    assert not common.Output.quiet
    assert run([*args, "--out", str(tmp_path / "run"), "--blocks", "Q"]) == 2
    assert "unknown layer kind" in capsys.readouterr().err


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(common, "LINE_S", 0.02)
    with common.progress_bar("distill: reads the model") as progress:
        time.sleep(0.05)
        progress("align", 0, 100)
        progress("align", 25, 100)
        time.sleep(0.05)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("distill: reads the model since ")
    assert told[-1].startswith("align: 25 of 100 (25%) after ")
    assert told[-1].endswith("s left")
    assert "\x1b" not in "".join(told)


def test_the_time_that_is_left_is_by_the_stage_so_far():
    lines = common._Lines("")
    lines.stage = ("align", 30, 90, 10, 100.0)
    assert lines.line(110.0) == "align: 30 of 90 (33%) after 10 s, about 30 s left"


def test_help_shows_examples_and_heeds_no_color():
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "nasbench", "search", "--help"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "nasbench search runs/mine --strategy beam" in re.sub(r"\x1b\[\d*m", "", told)
    assert "\x1b[3" not in told


def test_completion_is_there(capsys):
    assert run(["--help"]) == 0
    assert "--show-completion" in capsys.readouterr().out


def test_devices_are_checked():
    for name in ("tpu", "cuda:x", "cpu:"):
        if name != "cpu:":
            with pytest.raises(UserError, match="unknown torch device"):
                common.torch_device(name)
    with pytest.raises(MachineError, match="is not there"):
        common.torch_device("cuda:99")


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_waiting_threads_give_their_core_away_unless_told_otherwise(given):
    code = "import os; from nasbench.cli.main import run; run(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: text for name, text in os.environ.items() if name not in names} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = "None" if "OMP_WAIT_POLICY" in given else given.get("GOMP_SPINCOUNT", "1000")
    assert done.stdout.split()[-1] == expected
