"""Calibration by end-to-end measurements, uncertainty, judgement, and the speed of the cost model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_cost import CHUNK, SHAPE, rows_of

from nasbench.cli.main import run
from nasbench.core.errors import UserError
from nasbench.core.tables import read_table
from nasbench.cost import CalibrationRow, CostModel, add_calibration, load_cost_model
from nasbench.cost.calibration import (
    FOREIGN,
    LEVEL_SD,
    PRIOR_SCALE_SD,
    PRIOR_SD,
    RESIDUAL,
    Calibration,
    Measured,
    _drawn,
    calibration_path,
    fit,
    read_calibration,
)
from nasbench.cost.end_to_end import calibration_points
from nasbench.cost.holdout import Comparison, WholePoint, compare_point, evaluate, holdout_points, judge, spearman
from nasbench.devices import DeviceInfo
from nasbench.spaces.placement import format_placement
from nasbench.store import Database

PLACEMENTS = ["30A", "30W", "30J", "30G", "10A 10J 10G", "5A 25J"]
POINTS = [(1024, 1), (8192, 4)]


def end_to_end(placement: str, context: int, batch: int, time_ms: float, **cells) -> CalibrationRow:
    defaults = {"device": "dev", "model": SHAPE.name, "dtype": "fp32", "mode": "decode", "chunk": 0}
    facts = {"p20_ms": time_ms, "p80_ms": time_ms, "repeats": 5, "torch": "", "driver": "", "project": ""}
    place = {"placement": placement, "context": context, "batch": batch, "time_ms": time_ms, "measured_utc": ""}
    return CalibrationRow(**(defaults | facts | place | cells))


def world_ms(costs: CostModel, placement: str, context: int, batch: int) -> float:
    """A device on which shared blocks take 0.8 of their rows, J 1.2, and every layer 3 us more."""
    parts = costs._decode_parts(SHAPE.parse(placement), context, batch, False).features
    scales = {"shared": 0.8, "J": 1.2, "overhead": 3.0, "bs1_overhead": 3.0}
    return sum(scales.get(name, 1.0) * value for name, value in parts.items()) / 1e3


@pytest.fixture(scope="module")
def plain() -> CostModel:
    return CostModel(rows_of(), SHAPE, "fp32")


@pytest.fixture(scope="module")
def measured(plain) -> list[CalibrationRow]:
    return [end_to_end(p, c, b, world_ms(plain, p, c, b)) for p in PLACEMENTS for c, b in POINTS]


def test_a_few_measurements_correct_what_the_sum_of_rows_misses(plain, measured):
    costs = CostModel(rows_of(), SHAPE, "fp32", measured)
    for text in ("14J A 4J A 2W 8G", "29G A", "15A 15W"):
        for context, batch in ((2048, 1), (4000, 3)):
            true = world_ms(plain, text, context, batch)
            before = plain.decode(SHAPE.parse(text), context, batch)
            after = costs.decode(SHAPE.parse(text), context, batch)
            assert abs(after.step_ms / true - 1) < 0.015 < abs(before.step_ms / true - 1)
            assert (before.calibration_rows, after.calibration_rows) == (0, len(measured))
            assert after.step_stderr_ms < before.step_stderr_ms
            low, high = after.step_interval_ms
            assert low < true < high


def test_without_measurements_the_model_is_the_sum_of_its_rows(plain):
    assert fit([]) == Calibration()
    mean, stderr = Calibration().apply({"shared": 100.0, "A": 50.0, "overhead": 30.0})
    assert mean == 150.0
    constant = PRIOR_SD["overhead"] * 30
    expected = (PRIOR_SCALE_SD * 100) ** 2 + (PRIOR_SCALE_SD * 50) ** 2 + constant**2 + (RESIDUAL * 150) ** 2
    assert stderr == pytest.approx(expected**0.5)


def test_one_measurement_moves_little_and_leaves_other_kinds_alone():
    features = {"shared": 100.0, "A": 100.0, "overhead": 30.0}
    one = fit([Measured(features, 300.0)])
    assert 1.0 < one.coefficient("A") < 1.5
    assert one.coefficient("J") == 1.0
    foreign = fit([Measured(features, 300.0, weight=FOREIGN)])
    assert 1.0 < foreign.coefficient("A") < one.coefficient("A")


def test_steps_of_one_sequence_have_a_constant_of_their_own(plain):
    us = {batch: 1e3 * plain.decode(SHAPE.parse("30A"), 2048, batch).step_ms for batch in (1, 2)}
    several = CostModel(rows_of(), SHAPE, "fp32", [end_to_end("30A", 2048, 2, (us[2] + 100) / 1e3)])
    beside = several.decode(SHAPE.parse("30A"), 2048, 2).step_ms * 1e3
    assert several._calibrations["decode"].coefficient("bs1_overhead") == 0.0
    assert several._calibrations["decode"].coefficient("overhead") > 0.0
    assert beside > us[2]


def test_prefill_has_a_calibration_of_its_own(plain):
    placement = SHAPE.parse("15A 15J")
    seconds = 2048 / plain.prefill(placement, 2048, 1).prefill_tok_s
    row = end_to_end("15A 15J", 2048, 1, seconds * 1.3e3, mode="prefill", chunk=CHUNK)
    costs = CostModel(rows_of(), SHAPE, "fp32", [row])
    ratio = costs.prefill(placement, 2048, 1).prefill_tok_s / plain.prefill(placement, 2048, 1).prefill_tok_s
    assert 1 / 1.3 < ratio < 0.9
    assert costs.decode(placement, 2048, 1).step_ms == plain.decode(placement, 2048, 1).step_ms
    assert costs.prefill(placement, 2048, 1).prefill_stderr_tok_s > 0


def test_rows_of_other_devices_types_and_uncovered_points_do_not_count(measured, plain):
    strangers = [
        replace(measured[0], device="other"),
        replace(measured[0], dtype="bf16"),
        replace(measured[0], context=100),
        replace(measured[0], model="no-such-model"),
        replace(measured[0], model="qwen3-1.7b", placement="28A"),
    ]
    costs = CostModel(rows_of(), SHAPE, "fp32", strangers)
    assert costs.decode(SHAPE.placement, 2048, 1) == plain.decode(SHAPE.placement, 2048, 1)


def test_scatter_of_rows_widens_the_interval(plain):
    wide = [replace(row, p20_us=row.p20_us * 0.5, p80_us=row.p80_us * 1.5) for row in rows_of()]
    cost = CostModel(wide, SHAPE, "fp32").decode(SHAPE.placement, 2048, 1)
    same = plain.decode(SHAPE.placement, 2048, 1)
    assert cost.step_ms == same.step_ms
    assert cost.step_stderr_ms > 1.5 * same.step_stderr_ms


def test_energy_of_a_token(plain):
    assert plain.decode(SHAPE.placement, 2048, 4).j_per_token is None
    rows = [replace(row, energy_j=1e-3) for row in rows_of()]
    cost = CostModel(rows, SHAPE, "fp32").decode(SHAPE.placement, 8192, 4)
    blocks = 2 + (2 * 30 + 1) + 30 + 30
    assert cost.j_per_token == pytest.approx(blocks * 1e-3 / 4)


def test_files_beside_the_profile(tmp_path, measured, plain):
    path = tmp_path / "dev.csv"
    Database(path).merge(rows_of())
    add_calibration(calibration_path(path), measured[:6])
    add_calibration(calibration_path(path), measured[3:])
    again = replace(measured[0], time_ms=measured[0].time_ms * 2)
    add_calibration(calibration_path(path), [again])
    found = read_calibration(calibration_path(path))
    assert len(found) == len(measured)
    assert {row.key: row for row in found}[again.key].time_ms == pytest.approx(again.time_ms, abs=1e-4)
    for db in (tmp_path, path):
        assert load_cost_model("dev", SHAPE, "fp32", db).decode(SHAPE.placement, 2048, 1).calibration_rows == 12
    text = calibration_path(path).read_text()
    for bad, said in (("time_ms", "no column time_ms"), (f"{found[0].time_ms:.4f}", "time_ms: bad value 'soon'")):
        calibration_path(path).write_text(text.replace(bad, "soon", 1))
        with pytest.raises(UserError, match=said):
            load_cost_model("dev", SHAPE, "fp32", tmp_path)


def test_holdout(plain):
    points = [("30A", 2048, 1), ("15A 15J", 4096, 2), ("30J", 8192, 4)]
    errors = (0.02, -0.05, 0.01)
    rows = []
    for (text, context, batch), error in zip(points, errors, strict=True):
        step_ms = plain.decode(SHAPE.parse(text), context, batch).step_ms
        rows.append(end_to_end(text, context, batch, step_ms * (1 + error)))
    found, uncovered = evaluate(plain, [*rows, end_to_end("30A", 2048, 9, 1.0)])
    decode = found["decode"]
    assert [row.error for row in decode.rows] == pytest.approx(errors)
    assert (decode.mean, decode.worst, uncovered) == (pytest.approx(0.08 / 3), pytest.approx(0.05), 1)
    assert (decode.spearman, decode.inside, decode.mode) == (pytest.approx(1.0), 1.0, "decode")
    assert decode.rows[1].placement == format_placement(SHAPE.parse("15A 15J"))
    far, _ = evaluate(plain, [replace(rows[0], time_ms=rows[0].time_ms / 3)])
    assert far["decode"].inside == 0.0
    tok_s = plain.prefill(SHAPE.parse("30A"), 2048, 1).prefill_tok_s
    prefill = WholePoint("prefill", SHAPE.parse("30A"), 2048, 1)
    assert compare_point(plain, prefill, tok_s).error == pytest.approx(0.0)
    assert evaluate(plain, [replace(rows[0], model="other")]) == ({}, 0)
    with pytest.raises(UserError, match="batch 9"):
        compare_point(plain, WholePoint("decode", SHAPE.placement, 2048, 9), 1.0)


def test_files_of_measurements_judge_the_cost_model(plain, tmp_path, capsys):
    Database(tmp_path / "dev.csv").merge(rows_of())
    step_ms = plain.decode(SHAPE.placement, 2048, 1).step_ms
    own = end_to_end("30A", 2048, 1, step_ms)
    add_calibration(calibration_path(tmp_path / "dev.csv"), [own])
    seen = [end_to_end("30A", 2048, 2, step_ms * 1.2), end_to_end("30A", 2048, 9, step_ms)]
    measured, points = tmp_path / "elsewhere" / "measured.csv", tmp_path / "points.csv"
    add_calibration(measured, [own, *seen])
    (line,), comparisons = judge([own, *seen], tmp_path)
    assert (line["points"], line["not_covered"], line["calibrating"]) == (2, 1, 1)
    # What calibrates is judged by a fit without it.
    assert comparisons[0].error == pytest.approx(0.0)
    assert line["worst_error"] == pytest.approx(abs(comparisons[1].error), abs=1e-4)
    assert run(["db", "judge", str(measured), "--db", str(tmp_path), "--out", str(points), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"judged": [line]}
    assert read_table(points, Comparison)[0].placement == comparisons[0].placement
    assert run(["db", "judge", str(measured), "--db", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "1 measurements are outside of the profiled points" in told
    assert "1 measurements calibrate: each was judged by a fit without it" in told
    for bad, said in ((tmp_path / "absent.csv", "no such file"), (measured, "no such profile folder")):
        assert run(["db", "judge", str(bad), "--db", str(tmp_path / "nowhere")]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_holdout_points_cover_placements_contexts_and_batches(mode):
    asked = {"memory_bytes": 80 << 30, "dtype_bytes": 2, "prompt_tokens": 65536}
    points = holdout_points(SHAPE, ["A", "W64", "J"], mode, [1024, 4096, 8192], 24, **asked)
    assert points == holdout_points(SHAPE, ["A", "W64", "J"], mode, [1024, 4096, 8192], 24, **asked)
    assert {point.context for point in points} == {1024, 4096, 8192}
    assert len({point.batch for point in points}) > 4
    full = [point.placement.count("A") for point in points]
    assert (min(full), max(full)) == (0, 30)
    assert {name for point in points for name in point.placement} == {"A", "W64", "J"}
    assert all(point.tokens <= 2 * 65536 for point in points)


def test_ranks():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_steps_that_calibrate_are_within_the_profiled_batches():
    info = DeviceInfo("card", "a card", "cuda", 80 << 30, 0, 0, "", "")
    free = calibration_points(SHAPE, ("A", "J"), (2048,), info, 2)
    assert {1, 4} < {point.batch for point in free if point.mode == "decode"}
    bound = calibration_points(SHAPE, ("A", "J"), (2048,), info, 2, {8, 64})
    batches = {point.batch for point in bound if point.mode == "decode"}
    assert (min(batches), max(batches)) == (8, 64)
    one = calibration_points(SHAPE, ("A", "J"), (2048,), info, 2, {64})
    assert {point.batch for point in one if point.mode == "decode"} == {64}


def test_an_interval_covers_nine_of_ten_placements_like_those_that_calibrated():
    generator = np.random.default_rng(0)

    def measured(count: int, sd: float, drawn: bool = True) -> list[Measured]:
        found = []
        for share in generator.random(count):
            features = {"shared": 500.0, "A": 500.0 * share, "J": 500.0 * (1 - share), "overhead": 30.0}
            us = 1.1 * features["A"] + 0.95 * features["J"] + 500.0 + 60.0
            found.append(Measured(features, us * (1 + sd * generator.standard_normal()), drawn=drawn))
        return found

    for sd in (0.005, 0.04):
        inside = []
        for _ in range(10):
            calibration = fit(measured(20, sd))
            for row in measured(20, sd):
                us, stderr_us = calibration.apply(row.features)
                inside.append(abs(us - row.us) <= LEVEL_SD * stderr_us)
        assert 0.85 <= np.mean(inside) <= 0.96
    assert fit(measured(20, 0.005, drawn=False)).width == 1.25


def test_one_delayed_measurement_bends_little():
    features = [{"shared": 100.0, "A": 10.0 * share, "overhead": 1.0} for share in range(1, 11)]
    rows = [Measured(each, 100.0 + each["A"]) for each in features]
    delayed = replace(rows[4], us=1.4 * rows[4].us)
    assert fit([*rows, delayed]).apply(features[4])[0] == pytest.approx(rows[4].us, rel=0.01)


def test_prompts_that_the_host_launches_are_uncertain_whatever_calibrates():
    slow = [replace(row, host_us=row.p50_us and 4 * row.p50_us) if row.mode == "prefill" else row for row in rows_of()]
    plain = CostModel(slow, SHAPE, "fp32")
    placement = SHAPE.parse("15A 15J")
    bound = plain.prefill(placement, 2048, 1)
    rows = []
    for text in ("30A", "30J", "A 29J", "20A 10J", "10A 20J", "2J 28A", "A J 28A"):
        seconds = 2048 / plain.prefill(SHAPE.parse(text), 2048, 1).prefill_tok_s
        rows.append(end_to_end(text, 2048, 1, 600 * seconds, mode="prefill", chunk=CHUNK))
    after = CostModel(slow, SHAPE, "fp32", rows).prefill(placement, 2048, 1)
    assert after.prefill_tok_s == pytest.approx(bound.prefill_tok_s, rel=0.1)
    assert after.prefill_stderr_tok_s > 0.3 * after.prefill_tok_s


def test_which_placements_are_random(plain):
    rows = [end_to_end(text, 2048, 1, 20.0) for text in ("30A", " ".join(["A J G"] * 10), "29J A")]
    found = CostModel(rows_of(), SHAPE, "fp32", rows)._calibrations["decode"]
    assert found.rows == 3
    assert [_drawn(row.placement) for row in rows] == [False, False, True]
