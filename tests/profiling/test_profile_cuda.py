"""The same sweep on a GPU: graphs, peak memory, telemetry."""

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
