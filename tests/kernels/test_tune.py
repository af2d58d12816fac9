"""The launch tuner: candidates that are right, a check that finds wrong ones, a search that keeps faster ones."""

import pytest
import torch

pytest.importorskip("triton")

from nasbench_kernels import ops
from nasbench_kernels.common.launch import LIBRARY, LaunchKey, launch_for, recorded, sm_limits, tuned
from nasbench_kernels.gated_delta.decode import step_launch
from nasbench_kernels.linear.gemv import gemv_launch
from nasbench_kernels.linear.launch import GemmLaunch, gemm_launch, swiglu_gemm_launch
from nasbench_kernels.tune import climb as climbing
from nasbench_kernels.tune.candidates import CLOSE, error, neighbours
from nasbench_kernels.tune.climb import climb

GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float16
LIMITS = sm_limits(DEVICE)
A, B = LaunchKey("first", "", (1,)), LaunchKey("second", "", (2,))
CASES = {
    LaunchKey("gemv", "", (70, 600)): gemv_launch(70, 600, False),
    LaunchKey("gemv", "swiglu", (70, 600)): gemv_launch(70, 600, True),
    LaunchKey("gemm", "", (5, 70, 200)): gemm_launch(5, 70, 200, 2, *LIMITS, False),
    LaunchKey("gemm", "split_k", (5, 70, 1700)): gemm_launch(5, 70, 1700, 2, *LIMITS, True),
    LaunchKey("gemm", "swiglu", (5, 140, 200)): swiglu_gemm_launch(5, 70, 2, *LIMITS),
    LaunchKey("recurrent step", "torch.float32", (2, 2, 24, 100)): step_launch(4, 24, 100, LIMITS[0]),
}


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key.op} {key.variant}")
def test_candidates_compute_what_the_choice_does(key):
    candidates = neighbours(key, CASES[key], DEVICE)
    assert len(candidates) == len(set(candidates)) >= 4
    assert CASES[key] not in candidates
    assert error(key, CASES[key], DEVICE, DTYPE) < CLOSE
    for candidate in candidates[:: 1 if GPU else 3]:
        assert error(key, candidate, DEVICE, DTYPE) < CLOSE, candidate


def test_what_is_wrong_or_does_not_run_is_found():
    key = LaunchKey("gemm", "split_k", (5, 70, 1700))
    assert error(key, GemmLaunch(64, 16, 64, 4, 2, split_k=0), DEVICE, DTYPE) == float("inf")
    uncovered = LaunchKey("gemm", "", (40, 70, 200))  # of 40 sequences the tile holds 16
    assert not error(uncovered, GemmLaunch(64, 16, 64, 4, 2), DEVICE, DTYPE) < CLOSE


def test_choices_are_recorded_and_replaced():
    x, weight = torch.randn(5, 200).to(DEVICE, DTYPE), torch.randn(70, 200).to(DEVICE, DTYPE)
    with recorded() as asked:
        assert ops.prefer_skinny_gemm(x, weight)
        wanted = ops.gemm(x, weight)
    ((key, launch),) = asked
    assert key == LaunchKey("gemm", "", (5, 70, 200))
    assert asked[key, launch] == 2
    launches = {key: GemmLaunch(32, 16, 64, 4, 2)}
    with tuned(launches):
        assert launch_for(*key, default=lambda: None) == launches[key]
        assert torch.allclose(ops.gemm(x, weight), wanted, atol=1e-2)
        launches[key] = LIBRARY
        assert not ops.prefer_skinny_gemm(x, weight)
    assert ops.prefer_skinny_gemm(x, weight)


@pytest.fixture
def hill(monkeypatch):
    """Launches are numbers; a step takes 10 ms and their distances from 3 and 5. 7 is wrong for the second."""
    monkeypatch.setattr(climbing, "neighbours", lambda key, launch, device: [launch + 1, launch - 1])
    monkeypatch.setattr(climbing, "error", lambda key, launch, device: 1.0 if (key, launch) == (B, 7) else 0.0)
    launches = {A: 1, B: 6}
    return launches, lambda: 10.0 + abs(launches[A] - 3) + abs(launches[B] - 5)


def test_what_is_faster_stays(hill):
    launches, ms = hill
    said = []
    assert climb([A, B], launches, ms, lambda: 1.0, said.append, DEVICE) == 10.0
    assert launches == {A: 3, B: 5}
    assert sum("kept" in line for line in said) == 3
    assert any("left out, 1.0e+00 away" in line for line in said)


def test_a_lucky_time_is_not_kept(hill):
    launches, _ = hill
    times = iter([10.0, 10.0, 9.0, 10.0, 10.0, *[10.0] * 99])
    climb([A], launches, lambda: next(times), lambda: 1.0, lambda line: None, DEVICE)
    assert launches[A] == 1


def test_it_ends_with_its_seconds(hill):
    launches, ms = hill
    climb([A, B], launches, ms, lambda: 0.0, lambda line: None, DEVICE)
    assert launches == {A: 1, B: 6}
