"""Recurrent steps of benchmarks/launches.py: every launch is right before it has a time, the chosen one is first."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from nasbench_kernels.decode.recurrent import step_launch

import benchmarks.launches as bench
from benchmarks.kernel_cases import CLOSE
from benchmarks.state_cases import StateCase, label, launches, states
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.model.shapes import ModelSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = ModelSpec(
    "tiny", "qwen2", 4, 32, 48, 4, 2, 8, 96, 4096, 10_000.0, 1e-6, published_placement="A 2J G",
    defaults=(("J", "1x16x72"), ("G", "1x16x72")),
)  # fmt: skip
((LAYER, COUNT),) = states(TINY).items()
FP32 = {"device": DEVICE, "dtype": torch.float32, "sets": 2}
measure = partial(bench.state_rows, TINY, LAYER, COUNT, left=lambda: 1.0, **FP32)


def test_layers_of_a_shape():
    assert (LAYER.num_heads, LAYER.key_dim, LAYER.value_dim, COUNT) == (1, 16, 72, 2)
    ((layer, count),) = states(resolve_shape("jet-nemotron-2b")).items()
    assert (layer.args, count) == ("12x96x256", 24)
    assert not states(resolve_shape("qwen3-1.7b"))


@pytest.mark.parametrize(("batch", "sms"), [(1, 132), (64, 132), (128, 108), (512, 132)])
@pytest.mark.parametrize("shared", [100 << 10, 228 << 10])
@pytest.mark.parametrize("name", ["jet-nemotron-2b", "jet-nemotron-4b"])
def test_launches_of_the_published_shapes(name, batch, sms, shared, monkeypatch):
    monkeypatch.setattr("nasbench_kernels.decode.card.card", lambda device: (sms, shared))
    (layer,) = states(resolve_shape(name))
    found = launches(layer, batch, DEVICE)
    chosen = step_launch(batch * layer.num_heads, layer.key_dim, layer.value_dim, sms)
    assert found[0] == replace(chosen, stages=chosen.stages_for(4, layer.key_dim, shared))
    assert len(found) == len({label(launch) for launch in found}) > 12
    for launch in found:
        assert launch.block_v * launch.tiles * launch.parts == layer.value_dim
        assert launch.stages == launch.stages_for(4, layer.key_dim, shared)
    assert {launch.parts for launch in found} >= {1, 2, 4, 8}


def test_labels():
    (layer,) = states(resolve_shape("jet-nemotron-2b"))
    found = [label(launch) for launch in launches(layer, 64, torch.device("cpu"))]
    assert found[:3] == ["64x4p1w2s2", "32x8p1w2s3r128", "64x1p4w4s1r128"]
    assert "64x1p4w4s1r128ec" in found


@torch.inference_mode()
def test_every_launch_is_right():
    timed = []

    def time_us(calls):
        for call in calls[:1]:
            call()
        timed.append(len(calls))
        return 2.0 * len(calls)

    rows = list(measure(3, time_us=time_us))
    assert len(rows) > 8
    assert {row.status for row in rows} == {"ok"}
    assert all(0 < row.error < CLOSE["output"] for row in rows)
    assert {row.us for row in rows} == {2.0}
    assert [row.chosen for row in rows] == [True] + [False] * (len(rows) - 1)
    assert set(timed) == {16}
    assert {row.nbytes for row in rows} == {2 * 3 * 16 * 72 * 4}
    # mul_ took as long for as many bytes.
    assert all(math.isclose(row.in_place_tb_s, row.nbytes / 2.0 / 1e6) for row in rows)
    told = bench.lines(rows)
    assert len(told) == 1 + len(rows)
    assert all(text.endswith("1.00 of mul_") for text in told[1:])
    assert bench.sums(rows) == []
    assert bench.exit_code(rows) == 0


@pytest.mark.parametrize("wrong", ["output", "state", "history"])
@torch.inference_mode()
def test_what_is_wrong_has_no_time(wrong, monkeypatch):
    """The chosen launch and those after it, each by what it returns or writes; mul_ alone is timed."""
    plain = StateCase.step

    def step(case, row, kernels, history, state):
        result = plain(case, row, kernels, history, state)
        if wrong == "output":
            return result * 1.1
        (state if wrong == "state" else history).view(-1)[::3] *= 1.1
        return result

    monkeypatch.setattr(StateCase, "step", step)
    seconds = iter([1.0, 1.0, 0.0])
    timed = []
    rows = list(measure(3, time_us=lambda calls: timed.append(calls) or 2.0, left=lambda: next(seconds)))
    assert len(rows) == 2
    assert all(math.isnan(row.us) and row.status.startswith("wrong") for row in rows)
    assert len(timed) == 1
    assert bench.best_of(rows) is None
    assert bench.exit_code(rows) == 1
    assert bench.exit_code(rows[1:]) == 0  # not the chosen one


@torch.inference_mode()
def test_what_writes_nothing_is_wrong(monkeypatch):
    """Also where the launch before it left the right output in the memory."""
    case = StateCase(LAYER, 3, **FP32)
    launch = launches(LAYER, 3, DEVICE)[0]
    assert case.error(launch) < CLOSE["output"]
    stale = case.step(*case.sets[0])
    monkeypatch.setattr(case, "step", lambda *_: stale)
    assert case.error(launch) > 0.5


def test_the_part_among_the_others(monkeypatch, capsys):
    """64 to 512 sequences of each shape in turn, and what --batches asks for beyond; it keeps to its seconds."""
    works = list(bench.work_of([TINY], [1, 3, 64], lambda calls: 2.0, lambda part: 1.0, DEVICE))
    names = [name for part, name, _ in works if part == "states"]
    assert names == [f"tiny J 1x16x72 x{batch}" for batch in (64, 128, 256, 512, 3)]
    assert sorted({part for part, *_ in works}, key=bench.PARTS.index) == list(bench.PARTS)
    build = partial(measure, 3, time_us=lambda calls: 2.0 * len(calls))
    rows = bench.measure_all([("states", "tiny x3", build), ("states", "late", build)], 60, always_until(1))
    assert {row.status for row in rows} == {"ok"}
    told = capsys.readouterr().out
    assert "mul_" in told
    assert "states: the seconds did not suffice for late" in told


@pytest.mark.gpu
def test_the_part_on_a_gpu(tmp_path):
    out = tmp_path / "launches.json"
    arguments = ["--shapes", "jet-nemotron-2b", "--batches", "1", "--only", "states", "--seconds", "60"]
    assert bench.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert all(row["in_place_tb_s"] > 0 for row in rows)
    assert any(row["chosen"] and row["us"] > 0 for row in rows)
    assert not [row for row in rows if row["status"].startswith(("wrong", "does not run"))]


def always_until(works):
    """Seconds left for so many works."""
    left = iter([1.0] * works)
    return lambda part: next(left, 0.0)
