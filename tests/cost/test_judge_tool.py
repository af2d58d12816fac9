"""benchmarks/judge_cost.py: which points it takes, the search for the largest batch, and the report it writes."""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_calibration import end_to_end
from test_cost import rows_of

from nasbench.cost import CostModel, add_calibration
from nasbench.cost import end_to_end as end_to_end_module
from nasbench.cost.end_to_end import EndToEnd, find_largest
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.spaces.placement import count_kind
from nasbench.store import Database

SHAPE = MODELS["smollm2-135m"]
PATH = Path(__file__).parents[2] / "benchmarks" / "judge_cost.py"
CONTEXTS = [4096 << i for i in range(7)]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("judge_cost", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "judge_cost", module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_points_cover_placements_contexts_and_batches(tool, mode):
    shape = MODELS["jet-nemotron-2b"]
    points = tool.judge_points(
        shape, "AWJG", mode, CONTEXTS, 48, lambda placement, context: 4_000_000 // context, 131072
    )
    assert len(points) >= 44
    assert len({point.placement for point in points}) > 40
    full = {count_kind(point.placement, "A") for point in points}
    assert {0, 28} <= full
    assert len(full) > 8
    assert {point.context for point in points} == set(CONTEXTS)
    assert min(point.batch for point in points) == 1
    assert all(len(point.placement) == 28 for point in points)
    if mode == "prefill":
        assert max(point.batch * point.context for point in points) <= 2 * 131072
    else:
        assert any(point.batch == 4_000_000 // point.context for point in points)
    # The beginning alone covers them too: a run may be cut.
    some = points[:14]
    assert {point.context for point in some} == set(CONTEXTS)
    assert len({count_kind(point.placement, "A") for point in some}) > 6


@pytest.mark.parametrize("true", [0, 1, 7, 180, 187, 200, 214, 230])
def test_the_largest_batch_is_found(true):
    tried = []

    def runs(batch: int) -> bool:
        tried.append(batch)
        return batch <= true

    found = find_largest(runs, 187)
    assert found <= true
    assert true - found <= max(1, 0.01 * true)
    assert len(tried) < 14


def test_prompts_and_steps_of_a_tiny_model_are_measured():
    tiny = ModelSpec("tiny", "llama", 2, 32, 64, 2, 1, 16, 64, 256, 1e4, 1e-5, defaults=(("W", "16"),))
    whole = EndToEnd(tiny, "cpu", torch.float32)
    prompt = whole.prompt(("A", "J"), 48, 2, chunk=32)
    assert (prompt.mode, prompt.chunk, prompt.context, prompt.batch, prompt.repeats) == ("prefill", 32, 48, 2, 3)
    step = whole.step(("W", "J"), 48, 2, seconds=0.01)
    assert (step.mode, step.chunk, step.placement) == ("decode", 0, "W J")
    assert 0 < step.p20_ms <= step.time_ms <= step.p80_ms
    decoders = whole.decoders
    assert decoders.of(("A", "J")).layers[0].mlp is decoders.of(("W", "W")).layers[0].mlp


def test_the_report_of_known_errors(tool, tmp_path, capsys):
    Database(tmp_path / "db" / "dev.csv").merge(rows_of())
    costs = CostModel(rows_of(), SHAPE, "fp32")
    rows = []
    for place, text in enumerate(("30A", "15A 15J", "10A 10J 10G", "A 29W")):
        placement = SHAPE.parse(text)
        for context, batch in ((1024, 1), (8192, 4)):
            ms = costs.decode(placement, context, batch).step_ms * (1.02 if place % 2 else 0.98)
            rows.append(end_to_end(text, context, batch, ms))
        seconds = 2048 / costs.prefill(placement, 2048, 1).prefill_tok_s
        rows.append(end_to_end(text, 2048, 1, seconds * 1e3, mode="prefill", chunk=512))
    rows.append(replace(rows[0], batch=99))
    out = tmp_path / "out"
    add_calibration(out / "measured.csv", rows)
    command = ["report", "--model", SHAPE.name, "--dtype", "fp32", "--device", "dev", "--db", str(tmp_path / "db")]
    assert tool.main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "decode     8 points: mean error 2.0%, worst 2.0%" in said
    assert "prefill    4 points: mean error 0.0%" in said
    assert said.count("not covered") == 1
    predictions = list(csv.DictReader((out / "predictions.csv").open()))
    assert len(predictions) == 12
    assert {row["full_attention"] for row in predictions} == {"30", "15", "10", "1"}
    assert (out / "predicted-against-measured.png").stat().st_size > 5000
    assert "| decode | 8 | 1k to 8k | 1 to 4 | 1 to 30 | 2.0% | 2.0% |" in (out / "README.md").read_text()
    assert tool.main([*command, "--out", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_largest_batches_are_written(tool, tmp_path, monkeypatch, capsys):
    real = end_to_end_module._peak_of_a_step
    monkeypatch.setattr(end_to_end_module, "largest_batch", lambda *arguments, **options: 5)
    monkeypatch.setattr(end_to_end_module, "_peak_of_a_step", lambda *point: real(*point) if point[2] <= 6 else None)
    command = ["largest", "--model", "smollm2-135m", "--dtype", "bf16", "--torch-device", "cpu", "--contexts", "8,16"]
    assert tool.main([*command, "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "largest-batch.csv").open()))
    assert [(row["predicted_batch"], row["largest_batch"]) for row in rows] == [("5", "6")] * 4
    assert "predicted 5, runs 6 (-16.7%)" in capsys.readouterr().out
