"""The same sweep on a GPU: graphs, peak memory, telemetry."""

import statistics
import time

import pytest
import torch

from nasbench.model.shapes import MODELS
from nasbench.profiling.sweep import prepare, run
from nasbench.store import read_db

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_small_sweep_on_cuda(tmp_path):
    shape = MODELS["smollm2-135m"]
    asked = {"device": "cuda", "dtype": "bf16", "seconds_per_row": 0.05}
    result = run(prepare(shape, "AWJG", [1024, 4096], [1, 8], db=tmp_path, **asked))
    rows = read_db(result.path)
    problems = [f"{row.block} {row.mode} {row.status}: {row.reason}" for row in rows if row.status != "ok"]
    assert not problems
    for row in rows:
        assert row.implementation == ("cuda-graph" if row.mode == "decode" else "torch-eager")
        if row.block in "AWJG":
            assert row.cache_bytes == row.cache_formula_bytes
            assert row.peak_bytes is not None
            assert row.peak_bytes >= row.cache_bytes
    read = next(row for row in rows if row.args == "read")
    # Cold instances: no decode row may beat the memory by more than its measurement's spread.
    assert read.gb_s is not None
    assert all(row.gb_s <= 1.1 * read.gb_s for row in rows if row.block in "AWJG" and row.mode == "decode")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_sweep(tmp_path):
    """Rows of two cards are those of one within noise, and take about half of its time."""
    shape, seconds, rows = MODELS["smollm2-135m"], [], []
    for name, device in (("one", "cuda:0"), ("two", "cuda:0,cuda:1")):
        asked = {"device": device, "dtype": "bf16", "db": tmp_path / name}
        todo = prepare(shape, "AWJ", [1024, 4096, 8192], [1, 8, 64], ["decode"], **asked)
        began = time.monotonic()
        rows.append({row.key: row for row in run(todo).rows if row.block != "ceiling"})
        seconds.append(time.monotonic() - began)
    assert rows[0].keys() == rows[1].keys()
    ratios = [row.p50_us / rows[0][key].p50_us for key, row in rows[1].items() if row.p50_us]
    assert abs(statistics.median(ratios) - 1) < 0.02
    assert seconds[1] < 0.7 * seconds[0]
