"""benchmarks/kernels.py: its checks find what is wrong, and what is red has no speed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import benchmarks.kernels as bench
from benchmarks.kernel_cases import BEYOND_CACHE, Attention, RecurrentStep, Rule, Work, sets_of, worst

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY_STEP = {"device": DEVICE, "heads": 2, "key_dim": 24, "value_dim": 32, "dtype": torch.float32, "sets": 2}
TINY_CACHE = {"device": DEVICE, "dim": 16, "dtype": torch.float32, "sets": 1}
TINY_RULE = {
    "device": DEVICE, "heads": 2, "key_dim": 16, "value_dim": 24, "dtype": torch.float32,
    "timed": (1, 64), "checked": (1, 80),
}  # fmt: skip


class Fake(Work):
    nbytes = 2_000_000

    def __init__(self, error=0.0, raises=None):
        self.error, self.raises = error, raises

    def errors(self):
        if self.raises:
            raise self.raises
        return {"output": 0.0, "gradient (q)": self.error}

    def calls(self):
        return [lambda: None] * 4


@pytest.fixture
def judge(monkeypatch):
    """Every call takes 2 us; plain passes are made on small buffers."""
    monkeypatch.setattr(bench, "BUFFER_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("benchmarks.kernel_cases.sets_of", lambda _: 2)
    return bench.Judge(lambda calls: 2.0 * len(calls), device="cpu")


def case(ours=True, part=bench.RULE, **options):
    return bench.Case(part, "tiny", "ours" if ours else "theirs", lambda: Fake(**options), ours)


def test_checks_of_sound_kernels_are_green():
    assert not bench.red(RecurrentStep(2, **TINY_STEP).errors())
    for mixed in (False, True):
        errors = Attention(5, 70, 4, 2, mixed, **TINY_CACHE).errors()
        assert 0 < errors["output"] < 1e-4
    errors = Rule("ours", True, **TINY_RULE).errors()
    assert len(errors) == 7
    assert not bench.red(errors)
    assert set(Rule("ours", False, **TINY_RULE).errors()) == {"output", "final state"}


def test_checks_find_what_is_wrong(monkeypatch):
    work = RecurrentStep(2, **TINY_STEP)
    right = work.step
    monkeypatch.setattr(work, "step", lambda row, *rest: right(row * 1.1, *rest))
    assert set(bench.red(work.errors())) == {"output", "state", "history"}
    work = Attention(5, 70, 4, 2, **TINY_CACHE)
    whole = work.mix
    monkeypatch.setattr(work, "mix", lambda q, k, v, positions: whole(q, k, v, positions.clamp_min(1)))
    assert bench.red(work.errors())  # one sequence of one key looks at two
    work = Rule("ours", False, **TINY_RULE)
    monkeypatch.setattr(work, "rule", lambda *tensors: [x * math.nan for x in bench_rule(*tensors)])
    assert set(bench.red(work.errors())) == {"output", "final state"}


def bench_rule(*tensors):
    from nasbench_kernels.gated_delta import naive_gated_delta

    return naive_gated_delta(*tensors)


def test_traffic_and_sets():
    step = RecurrentStep(2, **TINY_STEP)
    assert step.nbytes == 2 * sum(tensors[3].nbytes for tensors in step.sets[:1])
    full, half = (Attention(5, 70, 4, 2, mixed, **TINY_CACHE) for mixed in (False, True))
    assert full.nbytes == sum(tensor.nbytes for tensor in full.sets[0][1:])
    assert full.nbytes / 2 < half.nbytes < full.nbytes
    assert half.positions.tolist() == [34, 42, 51, 60, 69]
    assert sets_of(1e6) * 1e6 >= BEYOND_CACHE
    assert sets_of(1e12) == 1
    assert math.isnan(worst([1.0, math.nan, 2.0]))


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_a_red_kernel_has_no_speed(judge, error):
    figure = judge(case(error=error))
    assert math.isnan(figure.us)
    assert "refused: gradient (q) is" in bench.line(figure)
    assert bench.exit_code([figure]) == 1
    theirs = judge(case(ours=False, error=error))
    assert "refused" in theirs.status
    assert bench.exit_code([theirs]) == 0


def test_what_cannot_run_is_told(judge):
    assert bench.exit_code([judge(case(raises=RuntimeError("does not compile\nat all")))]) == 1
    for options in (
        {"raises": torch.OutOfMemoryError("no room")},
        {"ours": False, "raises": ModuleNotFoundError("No module named 'fla'")},
    ):
        figure = judge(case(**options))
        assert figure.status.startswith("left out")
        assert bench.exit_code([figure]) == 0
    assert "No module named 'fla'" in bench.line(figure)


def test_speeds_and_fractions(judge):
    figure = judge(case(part=bench.RECURRENT))
    assert (figure.us, figure.tb_s) == (2.0, pytest.approx(1.0))
    assert figure.same_tb_s == pytest.approx(1.0)  # 1 MB read and written in 2 us
    assert figure.fraction == pytest.approx(1.0)
    assert "1.00 of 1.00 in place at this size" in bench.line(figure)
    assert "moves" not in bench.line(figure)
    more = bench.Figure(**{**vars(figure), "beside": figure.nbytes // 10})
    assert bench.line(more).endswith("with all that it moves 1.10")
    read = judge(case(part=bench.ATTENTION))
    assert read.large_tb_s == pytest.approx(65536 / 2e6)
    assert math.isnan(read.same_tb_s)
    slow = bench.Figure(**{**vars(read), "ours": False, "implementation": "SDPA", "us": 5.0})
    slower = bench.Figure(**{**vars(slow), "implementation": "other", "us": 9.0})
    assert bench.beside([read, slow, slower]) == ["decode attention, tiny: 2.50 times as fast as SDPA"]


def test_every_case_is_there():
    names = [(case.part, case.name, case.implementation) for case in bench.cases()]
    assert len(names) == len(set(names)) == 6 + 4 * 3 + 3 + 4
    assert (bench.ATTENTION, "16/8 heads, 18 x 64k, half to full", "ours") in names


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err


@pytest.mark.gpu
def test_one_part_on_a_gpu(tmp_path):
    out = tmp_path / "kernels.json"
    subprocess.run([sys.executable, str(SCRIPT), "--only", bench.RECURRENT, "--out", str(out)], check=True, timeout=120)
    told = json.loads(out.read_text())
    assert {figure["status"] for figure in told["figures"]} == {"ok"}
    assert all(0 < figure["tb_s"] < 20 for figure in told["figures"])
