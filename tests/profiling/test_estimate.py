"""Rows by roofline: efficiencies that a played device really has are found again, and the error bar is honest."""

import numpy as np
import pytest

from nasbench.core.errors import UserError
from nasbench.devices import DEVICES
from nasbench.model.shapes import MODELS
from nasbench.profiling.amounts import amounts
from nasbench.profiling.estimate import LEAST_ERROR, Estimator, learn, samples
from nasbench.profiling.plan import Point
from nasbench.store import Row, block_cells

SHAPE = MODELS["jet-nemotron-2b"]
POINTS = [
    Point(block, "decode", batch, context) for block in "AJ" for batch in (1, 8, 64, 256) for context in (4096, 65536)
]
POINTS += [Point("A", "prefill", batch, end, 2048) for batch in (1, 8) for end in (2048, 16384, 65536)]
POINTS += [Point("mlp", "decode", batch) for batch in (1, 64, 256, 1024)]


def played(device: str, launch_us=5.0, memory=0.8, compute=0.6, noise=0.0) -> list[Row]:
    """Rows of a device that obeys a roofline, its times scattered."""
    spec, random = DEVICES[device], np.random.default_rng(0)
    rows = []
    for point in POINTS:
        moved, flops = amounts(SHAPE, point, 2)
        us = launch_us + max(moved / spec.bandwidth_gb_s / 1e3 / memory, flops / spec.tflop_s / 1e6 / compute)
        us *= 1 + noise * random.standard_normal()
        config = None if point.shared else SHAPE.mixer(point.block)
        cells = block_cells(SHAPE, point.block) if config is None else block_cells(SHAPE, config.kind, config.args)
        place = {"mode": point.mode, "batch": point.batch, "context": point.context, "chunk": point.chunk}
        times = {"p20_us": us, "p50_us": us, "p80_us": us, "gb_s": moved / us / 1e3, "tflop_s": flops / us / 1e6}
        rows.append(Row(device=device, dtype="bf16", **cells, **place, **times))
    return rows


def estimated(rows: list[Row], device: str) -> dict[Point, Row]:
    return dict(zip(POINTS, Estimator(rows).rows(DEVICES[device], SHAPE, POINTS), strict=True))


def test_efficiencies_of_a_device_that_obeys_a_roofline_are_found():
    rule = Estimator(played("nvidia-h200")).rule("A", "decode")
    assert (rule.launch_us, rule.memory) == (pytest.approx(5.0, rel=0.02), pytest.approx(0.8, rel=0.02))
    assert Estimator(played("nvidia-h200")).rule("A", "prefill").compute == pytest.approx(0.6, rel=0.02)
    assert rule.error == LEAST_ERROR
    assert (rule.rows, rule.devices) == (8, ("nvidia-h200",))


@pytest.mark.parametrize("device", ["nvidia-rtx-3090", "nvidia-h100-sxm", "nvidia-jetson-orin-nx-16gb"])
def test_another_device_of_the_same_efficiencies_is_predicted(device):
    found, true = estimated(played("nvidia-h200"), device), played(device)
    for (point, row), real in zip(found.items(), true, strict=True):
        assert row.p50_us == pytest.approx(real.p50_us, rel=0.05), point
        assert row.p20_us < row.p50_us < row.p80_us
        assert (row.source, row.status, row.device) == ("estimated", "ok", device)
        assert (row.key[:12], row.batch, row.context) == (real.key[:12], real.batch, real.context)
    regimes = {point.mode: found[point].reason.split("-")[0] for point in POINTS if point.block == "A"}
    assert regimes["prefill"] == "compute"
    assert found[POINTS[7]].reason.startswith("memory-bound, +-5%, from 8 rows of nvidia-h200")


def test_the_error_bar_is_that_of_left_out_groups():
    calm = Estimator(played("nvidia-h200", noise=0.02)).rule("A", "decode").error
    wild = Estimator(played("nvidia-h200", noise=0.3)).rule("A", "decode").error
    assert calm < 0.1 < wild
    # Two devices of unlike efficiency: the bar says how little one tells of the other.
    both = [*played("nvidia-h200"), *played("nvidia-a100-sxm", memory=0.4)]
    assert Estimator(both).rule("A", "decode").error > 0.3
    assert learn(samples(played("nvidia-h200"), "bf16")["mlp", "decode"][:1]).error == 0.5


def test_a_kind_that_nobody_measured_is_taken_for_the_average():
    estimator = Estimator(played("nvidia-h200"))
    (row,) = estimator.rows(DEVICES["nvidia-rtx-4090"], SHAPE, [Point("G", "decode", 8, 4096)])
    assert row.p50_us is not None
    assert row.cache_formula_bytes == SHAPE.mixer("G").cache_bytes(8, 4096)
    decode = Estimator([row for row in played("nvidia-h200") if row.mode == "decode"])
    with pytest.raises(UserError, match="nothing to estimate prefill from"):
        decode.rule("A", "prefill")


def test_only_measured_rows_of_known_devices_teach():
    rows = played("nvidia-h200")
    strangers = [
        Row(**{**row.__dict__, "device": "some-cpu", "p50_us": 1.0, "p20_us": 1.0, "p80_us": 1.0}) for row in rows
    ]
    guesses = [Row(**{**row.__dict__, "source": "estimated", "device": "nvidia-a100-sxm"}) for row in rows]
    assert Estimator([*rows, *strangers, *guesses]).rules == Estimator(rows).rules
    for useless in ([], strangers, guesses):
        with pytest.raises(UserError, match="nothing to estimate from"):
            Estimator(useless)


def test_ceilings_keep_their_share_of_the_data_sheet():
    ceiling = {"block": "ceiling", "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0, "device": "nvidia-h200"}
    measured = [
        Row(args="read", gb_s=2400.0, **ceiling),
        Row(args="matmul", dtype="bf16", tflop_s=494.5, **ceiling),
        Row(args="launch", **ceiling),
    ]
    rows = Estimator([*played("nvidia-h200"), *measured]).rows(DEVICES["nvidia-rtx-3090"], SHAPE, [])
    found = {row.args: row for row in rows}
    assert found["read"].gb_s == pytest.approx(468.0)
    assert found["matmul"].tflop_s == pytest.approx(35.5)
    assert found["launch"].p50_us == 1.0
    assert {row.source for row in rows} == {"estimated"}
