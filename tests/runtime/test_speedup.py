"""benchmarks/speedup.py: the report from rows alone, what is measured again and what is not."""

import argparse
import csv
from dataclasses import fields, replace

import pytest
import torch

import benchmarks.speedup as bench
from nasbench.checkpoints.load import random_decoder
from nasbench.core.errors import MachineError, UserError
from nasbench.devices import detect
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.runtime import throughput
from nasbench.runtime.roofline import Ceilings
from nasbench.runtime.throughput import measure_prefill
from nasbench.search.table import read_rows, write_rows

TINY = ModelSpec("test", "llama", 3, 32, 48, 4, 2, 8, 97, 64, 1e4, 1e-5, defaults=(("W", "5"),))


def point(model, context, batch, mode, tok_s, floor_fraction=0.5, device="nvidia-h200", day=1):
    ms = batch * (1 if mode == "decode" else context) / tok_s * 1e3
    return bench.Point(
        model, context, batch, mode, tok_s, ms, ms * floor_fraction, floor_fraction, device, "bf16", "2.11", "580",
        f"2026-11-{day:02d}T00:00:00Z",
    )  # fmt: skip


@pytest.fixture
def points():
    return [
        point(bench.SLOW, 4096, 100, "decode", 2000.0, 0.5),
        point(bench.SLOW, 4096, 8, "prefill", 50_000.0, 0.5),
        point(bench.FAST, 4096, 1024, "decode", 40_000.0, 0.8, day=2),
        point(bench.FAST, 4096, 100, "decode", 10_000.0, 0.4),
        point(bench.FAST, 4096, 8, "prefill", 60_000.0, 0.25),
        point(bench.SLOW, 65536, 10, "decode", 150.0),
        point(bench.FAST, 65536, 2, "prefill", 45_000.0),
    ]


def test_ratios_and_limits(points):
    found = bench.pairs(points, 4096)
    assert {kind: (pair.fast.batch, pair.slow.batch) for kind, pair in found.items()} == {
        "largest": (1024, 100), "same": (100, 100), "prefill": (8, 8),
    }  # fmt: skip
    assert [found[kind].ratio for kind in ("largest", "same", "prefill")] == pytest.approx([20, 5, 1.2])
    # At their floors: 50,000 over 4,000, 25,000 over 4,000, 240,000 over 100,000.
    assert [found[kind].limit for kind in ("largest", "same", "prefill")] == pytest.approx([12.5, 6.25, 2.4])
    assert bench.pairs(points, 65536) == {}


def test_report_from_the_rows_alone(points, tmp_path, capsys):
    write_rows(tmp_path / bench.FILE, bench.Point, [*points, point(bench.SLOW, 4096, 9, "decode", 5.0, device="other")])
    assert bench.main(["report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| 4k | 1024 | 40,000 (0.80) | 100 | 2,000 (0.50) | 20 | 15.6 | 12.5 |" in text
    assert "| 4k | 100 | 10,000 (0.40) | 100 | 2,000 (0.50) | 5 |  | 6.25 |" in text
    assert "| 4k | 8 | 60,000 (0.25) | 8 | 50,000 (0.50) | 1.2 | 1.14 | 2.4 |" in text
    assert text.count("Not measured: 8k, 16k, 32k, 64k, 128k, 256k.") == 3
    assert "Measured 2026-11-01 to 2026-11-02, bf16, torch 2.11, driver 580." in text
    assert "## other" in text
    assert "nan" not in text.lower()
    header = next(csv.reader((tmp_path / bench.FILE).open()))
    assert header == [field.name for field in fields(bench.Point)]


def test_no_rows_and_no_gpu(tmp_path, capsys, monkeypatch):
    assert bench.main(["report", "--out", str(tmp_path)]) == 2
    assert "no rows in" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["measure", "--out", str(tmp_path)]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err


@pytest.fixture
def measurement(tmp_path, points):
    """As on the GPU of the rows, with its file."""
    found = object.__new__(bench.Measurement)
    found.options = argparse.Namespace(
        out=tmp_path, contexts=[4096, 65536], prompt_tokens=131072, seconds=30, step_seconds=0.01
    )
    found.path, found.points, found.left_out, found.share = tmp_path / bench.FILE, points, 0, bench.USUAL_SHARE
    found.info = argparse.Namespace(slug="nvidia-h200", driver="580")
    found.ceilings, found.dtype = Ceilings(4500, 4100, 4220, 770), torch.bfloat16
    return found


def test_only_what_is_missing_is_measured(measurement):
    fast, slow = MODELS[bench.FAST], MODELS[bench.SLOW]
    assert measurement.missing(slow, 4096) == [("prefill", 32)]  # there are prompts, but not so many
    assert measurement.missing(slow, 65536) == [("prefill", 2)]
    assert measurement.missing(fast, 65536) == [("decode", None), ("decode", 10)]
    assert measurement.missing(fast, 262144) == [("decode", None), ("prefill", 1)]
    measurement.options.prompt_tokens = 32768
    assert measurement.missing(fast, 4096) == measurement.missing(slow, 4096) == []
    measurement.info.slug = "nvidia-h100-sxm"
    assert measurement.missing(slow, 4096) == [("decode", None), ("prefill", 8)]


def test_a_run_measures_writes_and_resumes(measurement, monkeypatch):
    fast = replace(TINY, name=bench.FAST, published_placement="2J A")
    slow = replace(TINY, name=bench.SLOW, published_placement="3A")
    monkeypatch.setattr(bench, "resolve_shape", {bench.FAST: fast, bench.SLOW: slow}.get)
    monkeypatch.setattr(bench, "BATCHES", {32: 7})
    monkeypatch.setattr(bench.Measurement, "sound", lambda self, shape: True)
    monkeypatch.setattr(throughput, "largest_batch", lambda *_, **__: 3)
    monkeypatch.setattr(
        "nasbench.checkpoints.load.random_decoder", lambda shape, placement, **_: random_decoder(shape, placement)
    )
    measurement.points, measurement.info = [], detect("cpu")
    measurement.options.contexts, measurement.options.prompt_tokens = [32], 64
    assert measurement.run() == 0
    rows = read_rows(measurement.path, bench.Point)
    assert [(row.model, row.mode, row.batch) for row in rows[:3]] == [
        (bench.SLOW, "decode", 3), (bench.SLOW, "prefill", 2), (bench.FAST, "decode", 3),
    ]  # fmt: skip
    assert all(row.tok_s > 0 and row.floor_ms > 0 for row in rows)
    assert set(bench.pairs(rows, 32)) == {"largest", "same", "prefill"}
    measurement.points = [row for row in rows if row.mode == "decode"]
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: pytest.fail("measured again"))
    measurement.options.seconds = 0
    del measurement.points[-1:]
    assert measurement.missing(slow, 32) == [("prefill", 2)]
    measurement.decoder = None
    measurement.measure(slow, 32, "prefill", 2)  # would take longer than --seconds
    assert measurement.left_out == 1


def test_a_red_shape_is_not_measured(measurement, monkeypatch):
    monkeypatch.setattr(bench.Measurement, "sound", lambda self, shape: False)
    monkeypatch.setattr("nasbench.checkpoints.load.random_decoder", lambda *_, **__: pytest.fail("measured"))
    assert measurement.run() == 1


def test_prompt_flops():
    slow = MODELS[bench.SLOW]
    weights = slow.parameters() - slow.vocab_size * slow.hidden_size
    scores = slow.num_layers * 4 * slow.num_heads * slow.head_dim * 4096 * 4097 // 2
    assert bench.prompt_flops(slow, 4096) == pytest.approx(2 * 4096 * weights + scores, rel=1e-3)


def test_a_prompt_without_a_decode(monkeypatch):
    decoder = random_decoder(TINY, ("A", "W", "J"))
    seconds, chunk = measure_prefill(decoder, 40, 2, chunk=16)
    assert seconds > 0
    assert chunk == 16
    with pytest.raises(UserError, match="context 65 is beyond"):
        measure_prefill(decoder, 65, 1)

    def refuses(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(decoder, "new_cache", refuses)
    with pytest.raises(MachineError, match="9 sequences of 40 tokens does not fit"):
        measure_prefill(decoder, 40, 9)
