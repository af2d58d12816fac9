"""Rows of a device from those of another one: the roofline scales, launches do not, and the error bar says how sure."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nasbench
from nasbench.core.errors import UserError
from nasbench.devices import DEVICES
from nasbench.model.shapes import MODELS
from nasbench.profiling.amounts import amounts
from nasbench.profiling.estimate import check, estimate
from nasbench.profiling.plan import Point
from nasbench.store import Row, block_cells, read_db

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


def to(device: str, rows: list[Row]) -> list[Row]:
    return estimate(rows, DEVICES["nvidia-h200"], DEVICES[device])


@pytest.mark.parametrize("device", ["nvidia-rtx-3090", "nvidia-h100-sxm", "nvidia-jetson-orin-nx-16gb"])
def test_a_device_of_the_same_shares_is_predicted(device):
    """Launches of 5 us that no bandwidth shortens, 0.8 of the bandwidth, 0.6 of the rate."""
    measured = played("nvidia-h200")
    shares = [("read", {"gb_s": 0.8 * 4800.0}), ("matmul", {"tflop_s": 0.6 * 989.0, "dtype": "bf16"})]
    times = {"p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0}
    measured += [Row(device="nvidia-h200", block="ceiling", args=args, **times, **cells) for args, cells in shares]
    found, true = to(device, measured), played(device)
    for row, real in zip(found, true, strict=False):
        assert row.key == real.key
        # The launches of a row that products bind are taken for their inefficiency.
        assert row.p50_us == pytest.approx(real.p50_us, rel=0.02 if row.reason.startswith("memory") else 0.2), row
        assert row.p20_us < row.p50_us < row.p80_us
        assert (row.source, row.status, row.device) == ("estimated", "ok", device)
        assert row.gb_s * row.p50_us == pytest.approx(real.gb_s * real.p50_us)
    assert {row.reason.split("-")[0] for row in found if row.block == "A"} == {"memory", "compute"}
    assert len(check(found, true)) == len(POINTS)


def test_what_is_far_from_its_roofline_and_another_architecture_is_less_sure():
    def bar(device: str, **how) -> float:
        row = to(device, played("nvidia-h200", **how))[0]
        return row.p80_us / row.p50_us

    near, far, elsewhere = bar("nvidia-h100-sxm"), bar("nvidia-h100-sxm", launch_us=100.0), bar("nvidia-rtx-3090")
    assert 1.02 < near < far
    assert near + 0.1 < elsewhere


def test_a_check_counts_what_lies_in_the_interval():
    rows = to("nvidia-h100-sxm", played("nvidia-h200"))
    real = [
        replace(row, source="measured", p20_us=0.1, p50_us=row.p50_us * (1.5 if i else 1.0), p80_us=1e9)
        for i, row in enumerate(rows)
    ]
    assert [point.inside for point in check(rows, real)] == [True] + [False] * (len(rows) - 1)
    assert [round(point.error, 3) for point in check(rows, real)][:2] == [0.0, -0.333]
    assert check(rows, rows) == []


def test_an_h100_and_an_h200_predict_each_other():
    """The bars of the project: a mean error of at most 12 % over 40 points or more, a 90 % interval that holds 85 to
    95 % of them."""
    names = ("nvidia-h100-sxm", "nvidia-h200")
    folder = Path(nasbench.__file__).parents[1] / "reports" / "estimates" / "rows"
    rows = {name: read_db(folder / f"{name}.csv") for name in names}
    for source, target in (names, names[::-1]):
        points = check(estimate(rows[source], DEVICES[source], DEVICES[target]), rows[target])
        assert len(points) >= 40
        assert np.mean([abs(point.error) for point in points]) <= 0.12
        assert 0.85 <= np.mean([point.inside for point in points]) <= 0.95


def test_only_measured_rows_of_the_source_teach():
    rows = played("nvidia-h200")
    strangers = [replace(row, device="some-cpu") for row in rows]
    guesses = [replace(row, source="estimated", batch=3) for row in rows]
    failed = [replace(row, status="oom", batch=5) for row in rows]
    assert len(to("nvidia-a100-sxm", [*rows, *strangers, *guesses, *failed])) == len(rows)
    for useless in ([], strangers, guesses, [replace(row, dtype="fp32") for row in rows]):
        with pytest.raises(UserError, match="nothing to estimate from"):
            to("nvidia-a100-sxm", useless)


def test_ceilings_keep_their_share_of_the_data_sheet():
    ceiling = {"block": "ceiling", "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0, "device": "nvidia-h200"}
    measured = [
        Row(args="read", gb_s=2400.0, **ceiling),
        Row(args="matmul", dtype="bf16", tflop_s=494.5, **ceiling),
        Row(args="launch", **ceiling),
    ]
    found = {
        row.args: row for row in to("nvidia-rtx-3090", [*played("nvidia-h200"), *measured]) if row.block == "ceiling"
    }
    assert found["read"].gb_s == pytest.approx(468.0)
    assert found["matmul"].tflop_s == pytest.approx(35.5)
    assert found["launch"].p50_us == 1.0
    assert {row.source for row in found.values()} == {"estimated"}
