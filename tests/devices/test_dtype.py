"""The data type that the quickstart takes."""

import pytest

from nasbench.devices import dtype as dtype_module
from nasbench.devices.dtype import faster_dtype
from nasbench.pipeline import prepare, read_recipe, run_steps


@pytest.mark.parametrize(("seconds", "expected"), [((2.0, 1.0), "bf16"), ((1.0, 2.0), "fp32")])
def test_the_faster_one_on_a_cpu(monkeypatch, seconds, expected):
    answers = iter(seconds)
    monkeypatch.setattr(dtype_module, "_least_seconds", lambda call: (call(), next(answers))[1])
    assert faster_dtype("cpu") == expected


def test_a_gpu_takes_bf16_without_trying(monkeypatch):
    monkeypatch.setattr(dtype_module, "_least_seconds", None)
    assert faster_dtype("cuda") == "bf16"


def test_a_second_run_goes_on_with_the_firsts(monkeypatch, tmp_path):
    answers = iter(["fp32", "bf16"])
    monkeypatch.setattr(dtype_module, "faster_dtype", lambda device: next(answers))
    recipe = read_recipe("quickstart")
    for _ in range(2):
        _, state = prepare(recipe, tmp_path, "cpu", {})
        assert state.settings["dtype"] == "fp32"
        run_steps([], state, list, print)
