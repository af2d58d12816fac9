"""benchmarks/step_launches.py keeps what makes a whole step shorter, twice, and nothing else."""

import pytest
import torch

pytest.importorskip("triton")

from nasbench_kernels import decode
from nasbench_kernels.decode import product, recurrent

import benchmarks.step_launches as bench
from benchmarks.launch_cases import Candidate
from nasbench.checkpoints.resolve import resolve_shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parts():
    return bench.parts_of(resolve_shape("jet-nemotron-2b"), 64, DEVICE)


def test_parts_are_those_that_most_layers_have():
    found = parts()
    names = [part.what if isinstance(part.what, str) else part.what.part for part in found]
    assert sorted(names) == ["down", "gate+up", "generator", "inputs", "outputs", "recurrent step"]
    for part in found:
        assert part.now == part.tried[0]
        assert len(part.tried) > 5
        assert len({bench.told(choice) for choice in part.tried}) == len(part.tried)


def test_what_is_shorter_twice_is_kept():
    found = parts()[:2]
    good, lucky = found[0].tried[3], found[1].tried[2]
    calls = []

    def ms():
        """`lucky` is fast once."""
        calls.append(found[1].now)
        time = 9.0 if found[0].now == good else 10.0
        return time - 1 if found[1].now == lucky and calls.count(lucky) == 1 else time

    said = []
    assert bench.climb(found, ms, lambda: 1.0, said.append) == 9.0
    assert [part.now for part in found] == [good, found[1].tried[0]]
    assert sum("kept" in line for line in said) == 1


def test_time_is_up():
    said = []
    assert bench.climb(parts(), lambda: 10.0, lambda: 0.0, said.append) == 10.0
    assert said[-1] == "the seconds are over"


def test_choices_are_in_place_and_leave_no_trace():
    found = parts()
    before = (product.batch_launch, product.swiglu_launch, decode.streams, recurrent.step_launch)
    by_name = {part.what if isinstance(part.what, str) else part.what.part: part for part in found}
    down, state, gate_up = by_name["down"], by_name["recurrent step"], by_name["gate+up"]
    x, weight = torch.empty(64, 8960, device="meta", dtype=torch.bfloat16), torch.empty(1536, 8960, device="meta")
    with bench.in_place(found):
        assert product.batch_launch(64, 1536, 8960, 2, 132, 228 << 10, True) == down.now.launch
        down.now = Candidate("cuBLAS")
        assert not decode.streams(x, weight, divided=True)
        down.now = down.tried[2]
        assert decode.streams(x, weight, divided=True)
        assert product.batch_launch(64, 1536, 8960, 2, 132, 228 << 10, True) == down.tried[2].launch
        assert product.swiglu_launch(64, 8960, 2, 132, 228 << 10) == gate_up.now.launch
        state.now = state.tried[-1]
        assert recurrent.step_launch(768, 96, 256, 132) == state.tried[-1]
        # Of others the kernels decide.
        assert product.batch_launch(64, 7, 64, 2, 132, 228 << 10, False) == before[0](
            64, 7, 64, 2, 132, 228 << 10, False
        )
    assert before == (product.batch_launch, product.swiglu_launch, decode.streams, recurrent.step_launch)


def test_what_is_wrong_is_not_tried(monkeypatch):
    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        map = staticmethod(map)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "check", lambda shape, batch, i, j: 1.0 if (i, j) == (1, 2) else 1e-3)
    found = parts()
    wrong, counts = found[1].tried[2], [len(part.tried) for part in found]
    (line,) = bench.checked("jet-nemotron-2b", 64, found, 2)
    assert line.startswith(f"{found[1].title} {bench.told(wrong)}: left out, 1.0e+00 away")
    assert wrong not in found[1].tried
    assert [len(part.tried) for part in found] == [count - (i == 1) for i, count in enumerate(counts)]
    monkeypatch.setattr(bench, "check", lambda shape, batch, i, j: float("nan"))
    with pytest.raises(bench.UserError, match="what the kernels choose is wrong here"):
        bench.checked("jet-nemotron-2b", 64, parts(), 2)


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err
    for arguments, text in (
        (["--batch", "129"], "choose 2 to 128"), (["--shape", "jet-nemotron-9b"], "jet-nemotron-9b"),
        (["--jobs", "0"], "at least 1"), (["--context", "much"], "much"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert text in capsys.readouterr().err


@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(tmp_path):
    out = tmp_path / "steps.txt"
    arguments = ["--shape", "qwen2.5-1.5b", "--batch", "3", "--context", "1k", "--seconds", "40", "--jobs", "4"]
    assert bench.main([*arguments, "--out", str(out)]) == 0
    assert "at the end:" in out.read_text()
