"""benchmarks/kernels.py: its checks find what is wrong, and a kernel that is wrong has no speed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from nasbench_kernels.attention import decode as attention
from nasbench_kernels.gated_delta import decode as recurrent
from nasbench_kernels.gated_delta import naive_gated_delta

import benchmarks.kernels as bench
from benchmarks import common

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY_STEP = {"device": DEVICE, "heads": 2, "key_dim": 24, "value_dim": 32, "dtype": torch.float32}
TINY_CACHE = {"device": DEVICE, "dim": 16, "dtype": torch.float32}
TINY_RULE = {
    "device": DEVICE, "heads": 2, "key_dim": 16, "value_dim": 24, "dtype": torch.float32,
    "timed": (1, 64), "checked": (1, 80),
}  # fmt: skip
RATES = {bench.RECURRENT: 2.0, bench.ATTENTION: 4.0}


@pytest.fixture(autouse=True)
def few_sets(monkeypatch):
    monkeypatch.setattr(bench, "sets_of", lambda _: 2)


def case(implementation="ours", part=bench.RULE, error=0.0, raises=None):
    def errors():
        if raises:
            raise raises
        return {"output": 0.0, "gradient (q)": error}

    build = lambda: bench.Work([lambda: None] * 4, errors, 2_000_000)  # noqa: E731
    return bench.Case(part, "tiny", implementation, build)


def measured(**options):
    """Every call takes 2 us."""
    found = case(**options)
    bench.measure(found, lambda calls: 2.0 * len(calls), RATES)
    return found


def test_sound_kernels_pass():
    assert not bench.wrong(bench.recurrent(2, **TINY_STEP).errors())
    for mixed in (False, True):
        errors = bench.attention(5, 70, 4, 2, mixed, **TINY_CACHE).errors()
        assert 0 < errors["output"] < 1e-4
    errors = bench.rule("ours", True, **TINY_RULE).errors()
    assert len(errors) == 7
    assert not bench.wrong(errors)
    assert set(bench.rule("ours", False, **TINY_RULE).errors()) == {"output", "final state"}


def test_wrong_kernels_do_not(monkeypatch):
    right = recurrent.recurrent_step
    monkeypatch.setattr(recurrent, "recurrent_step", lambda row, *rest: right(row * 1.1, *rest))
    assert set(bench.wrong(bench.recurrent(2, **TINY_STEP).errors())) == {"output", "state", "conv state"}
    attend = attention.decode_attention
    monkeypatch.setattr(attention, "decode_attention", lambda q, k, v, at, span: attend(q, k, v, at.clamp_min(1), span))
    assert bench.wrong(bench.attention(5, 70, 4, 2, **TINY_CACHE).errors())  # one sequence of one key sees two
    monkeypatch.setattr(
        "nasbench_kernels.gated_delta.prefill.triton_gated_delta",
        lambda *x: [y * math.nan for y in naive_gated_delta(*x)],
    )
    assert set(bench.wrong(bench.rule("ours", False, **TINY_RULE).errors())) == {"output", "final state"}


def test_traffic_and_sets():
    full, half = (bench.attention(5, 70, 4, 2, mixed, **TINY_CACHE) for mixed in (False, True))
    assert full.nbytes == 2 * 5 * 70 * 2 * 16 * 4
    assert full.nbytes / 2 < half.nbytes < full.nbytes
    assert bench.recurrent(2, **TINY_STEP).nbytes == 2 * 2 * 2 * 24 * 32 * 4
    assert common.sets_of(1e6) * 1e6 >= common.BEYOND_CACHE
    assert common.sets_of(1e12) == 1
    assert math.isnan(common.worst([1.0, math.nan, 2.0]))


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_a_wrong_kernel_has_no_speed(error):
    found = measured(error=error)
    assert math.isnan(found.us)
    assert "refused: gradient (q) is" in bench.line(found)
    theirs = measured(implementation="fla", error=error)
    assert "refused" in theirs.status
    assert not theirs.ours


def test_a_kernel_that_does_not_run():
    assert measured(raises=RuntimeError("does not compile\nat all")).status == "refused: does not compile"
    for options in (
        {"raises": torch.OutOfMemoryError("no room")},
        {"implementation": "fla", "raises": ModuleNotFoundError("No module named 'fla'")},
    ):
        found = measured(**options)
        assert found.status.startswith("left out")
    assert "No module named 'fla'" in bench.line(found)


def test_speeds_and_fractions():
    found = measured(part=bench.RECURRENT)
    assert (found.us, found.tb_s) == (2.0, pytest.approx(1.0))
    assert "0.50 of 2.00" in bench.line(found)
    assert "of" not in bench.line(measured()).split("TB/s")[1]


def test_every_case_is_there():
    names = [(case.part, case.name, case.implementation) for case in bench.cases()]
    assert len(names) == len(set(names)) == 6 + 4 * 3 + 3 + 4
    assert (bench.ATTENTION, "16/8 heads, 18 x 64k, half to full", "ours") in names


@pytest.mark.parametrize("script", ["decode", "kernels", "launches", "speedup"])
def test_without_a_gpu(script, monkeypatch, capsys):
    module = __import__(f"benchmarks.{script}", fromlist=["main"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main([]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err


def test_bad_input_is_named_before_work(monkeypatch, capsys):
    import benchmarks.decode as module

    assert module.main(["jet-nemotron-2b:64k"]) == 2
    assert "bad case 'jet-nemotron-2b:64k'" in capsys.readouterr().err


@pytest.mark.gpu
def test_one_part_on_a_gpu(tmp_path):
    out = tmp_path / "kernels.json"
    subprocess.run([sys.executable, str(SCRIPT), "--only", bench.RECURRENT, "--out", str(out)], check=True, timeout=120)
    figures = json.loads(out.read_text())["figures"]
    assert {figure["status"] for figure in figures} == {"ok"}
    assert all(0 < figure["tb_s"] < 20 for figure in figures)
