"""Calibration by end-to-end measurements, uncertainty, judgement, and the speed of the cost model."""

import time
from dataclasses import replace

import numpy as np
import pytest
from test_cost import CHUNK, SHAPE, make, rows_of

from nasbench.core.errors import UserError
from nasbench.cost import CalibrationRow, CostModel, add_calibration, judge, load_cost_model
from nasbench.cost.calibration import (
    FOREIGN,
    PRIOR_SCALE_SD,
    PRIOR_SD,
    RESIDUAL,
    Calibration,
    calibration_path,
    fit,
    read_calibration,
)
from nasbench.cost.judge import spearman
from nasbench.model.shapes import MODELS
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
    scales = {"shared": 0.8, "J": 1.2, "constant": 3.0, "alone": 3.0}
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
    # The vectorised form is calibrated in the same way.
    placements = [SHAPE.parse(text) for text in PLACEMENTS]
    many = costs.decode_many(placements, 3000, 2)
    assert many == pytest.approx([costs.decode(p, 3000, 2).decode_tok_s for p in placements], rel=1e-12)
    layers = sum(costs.layer_us(name, 3000, 2) for name in placements[4])
    assert layers < costs.decode(placements[4], 3000, 2).step_ms * 1e3


def test_without_measurements_the_model_is_the_sum_of_its_rows(plain):
    assert fit([]) == Calibration()
    mean, stderr = Calibration().apply({"shared": 100.0, "A": 50.0, "constant": 30.0})
    assert mean == 150.0
    constant = PRIOR_SD["constant"] * 30
    expected = (PRIOR_SCALE_SD * 100) ** 2 + (PRIOR_SCALE_SD * 50) ** 2 + constant**2 + (RESIDUAL * 150) ** 2
    assert stderr == pytest.approx(expected**0.5)


def test_one_measurement_moves_little_and_leaves_other_kinds_alone():
    one = fit([({"shared": 100.0, "A": 100.0, "constant": 30.0}, 300.0, 1.0)])
    assert 1.0 < one.coefficient("A") < 1.5
    assert one.coefficient("J") == 1.0
    foreign = fit([({"shared": 100.0, "A": 100.0, "constant": 30.0}, 300.0, FOREIGN)])
    assert 1.0 < foreign.coefficient("A") < one.coefficient("A")


def test_steps_of_one_sequence_have_a_constant_of_their_own(plain):
    us = {batch: 1e3 * plain.decode(SHAPE.parse("30A"), 2048, batch).step_ms for batch in (1, 2)}
    several = CostModel(rows_of(), SHAPE, "fp32", [end_to_end("30A", 2048, 2, (us[2] + 100) / 1e3)])
    alone, beside = (several.decode(SHAPE.parse("30A"), 2048, batch).step_ms * 1e3 for batch in (1, 2))
    assert several._calibrations["decode"].coefficient("alone") == 0.0
    assert several._calibrations["decode"].coefficient("constant") > 0.0
    assert beside > us[2]
    codes = several.decode_many([SHAPE.parse("30A")], 2048, 1)
    assert codes[0] == pytest.approx(1e6 / alone)


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


def test_judgement(plain):
    triples = [("30A", 2048, 1), ("15A 15J", 4096, 2), ("30J", 8192, 4)]
    errors = (0.02, -0.05, 0.01)
    measured = []
    for (text, context, batch), error in zip(triples, errors, strict=True):
        predicted = plain.decode(SHAPE.parse(text), context, batch).decode_tok_s
        measured.append((SHAPE.parse(text), context, batch, predicted / (1 + error)))
    found = judge(plain, measured)
    assert [row.error for row in found.rows] == pytest.approx(errors)
    assert (found.mean, found.worst) == (pytest.approx(0.08 / 3), pytest.approx(0.05))
    assert (found.spearman, found.inside, found.mode) == (pytest.approx(1.0), 1.0, "decode")
    assert found.rows[1].placement == format_placement(SHAPE.parse("15A 15J"))
    far = judge(plain, [(*measured[0][:3], measured[0][3] * 3)])
    assert far.inside == 0.0
    tok_s = plain.prefill(SHAPE.parse("30A"), 2048, 1).prefill_tok_s
    assert judge(plain, [(SHAPE.parse("30A"), 2048, 1, tok_s)], "prefill").worst == pytest.approx(0.0)
    with pytest.raises(UserError, match="nothing to judge"):
        judge(plain, [])
    with pytest.raises(UserError, match="batch 9"):
        judge(plain, [(SHAPE.placement, 2048, 9, 1.0)])


def test_ranks():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_codes_with_contexts_and_batches_of_their_own(plain):
    random = np.random.default_rng(0)
    names = ["A", "J", "W"]
    codes = random.integers(0, 3, (40, 30))
    contexts, batches = random.choice([1024, 3000, 8192], 40), random.choice([1, 3, 4], 40)
    found = plain.decode_codes(codes, names, contexts, batches)
    for row, context, batch, tok_s in zip(codes, contexts, batches, found, strict=True):
        placement = tuple(names[code] for code in row)
        assert tok_s == pytest.approx(plain.decode(placement, int(context), int(batch)).decode_tok_s, rel=1e-12)
    mixed = [("A", "W64") * 15, ("W64", "J") * 15]
    rows = [*rows_of(), *(make("W64", batch, context) for batch in (1, 4) for context in (1024, 8192))]
    costs = CostModel(rows, SHAPE, "fp32")
    expected = [costs.decode(placement, 2048, 1).decode_tok_s for placement in mixed]
    assert costs.decode_many(mixed, 2048, 1) == pytest.approx(expected, rel=1e-12)


def test_a_million_placements_a_second(plain, capsys):
    """The bar is a million on two free cores; a shared machine gets a margin of five."""
    count = 200_000
    random = np.random.default_rng(0)
    codes = random.integers(0, 4, (count, 30)).astype(np.uint8)
    letters = np.array(list("AWJG"))[codes]
    placements = list(map(tuple, letters.tolist()))
    rates = {}
    for what, work in {
        "codes": lambda: plain.decode_codes(codes, "AWJG", 3000, 2),
        "tuples": lambda: plain.decode_many(placements, 3000, 2),
    }.items():
        work()
        best = min(_seconds(work) for _ in range(5))
        rates[what] = count / best
    with capsys.disabled():
        print("\nplacements/s: " + ", ".join(f"{what} {rate / 1e6:.1f} M" for what, rate in rates.items()))
    assert rates["codes"] > 200_000
    assert rates["tuples"] > 200_000
    assert MODELS[SHAPE.name] is SHAPE


def _seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
