"""Models whose FFNs are not gated, or that have more norms, are profiled and predicted as others are."""

from collections import Counter
from dataclasses import replace

import pytest

from nasbench.core.by_device import ByDevice
from nasbench.cost import CostModel
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.profiling.amounts import amounts
from nasbench.profiling.plan import Point
from nasbench.profiling.sweep import prepare, run
from nasbench.runtime.memory import activation_bytes
from nasbench.runtime.roofline import decode_bytes
from nasbench.store import Row, block_cells, read_db, shared_blocks

DENSE = ModelSpec("dense", "llama", 4, 64, 128, 4, 2, 16, 256, 512, 1e4, 1e-5)
MIXTURE = replace(DENSE, name="mixture", ffn=("gated", "moe@8x2x32", "moe@8x2x32", "none"))


def test_names_of_shared_blocks():
    assert shared_blocks(DENSE) == ("embedding", "norm", "mlp", "head")
    assert shared_blocks(MIXTURE) == ("embedding", "norm", "mlp", "moe@8x2x32", "head")


def test_cells_of_gated_ffns_are_those_of_old_rows():
    shape = MODELS["smollm2-135m"]
    cells = block_cells(shape, "mlp")
    assert (cells["block"], cells["args"], cells["hidden_size"], cells["intermediate_size"]) == ("mlp", "", 576, 1536)
    assert cells["num_heads"] == cells["vocab_size"] == 0
    assert block_cells(replace(shape, activation="gelu_tanh"), "mlp")["args"] == "gelu_tanh"
    assert block_cells(shape, "gated@4096")["intermediate_size"] == 4096
    found = block_cells(MIXTURE, "moe@8x2x32")
    assert (found["block"], found["args"], found["hidden_size"], found["intermediate_size"]) == ("moe", "8x2x32", 64, 0)


def test_a_mixture_moves_the_experts_that_tokens_hit():
    one, many = (amounts(MIXTURE, Point("moe@8x2x32", "decode", batch), 2) for batch in (1, 512))
    expert = 3 * 64 * 32
    assert one == (2 * (64 * 8 + 2 * expert) + 2 * 2 * 64, 2 * (64 * 8 + 2 * expert))
    assert many[0] == pytest.approx(2 * (64 * 8 + 8 * expert) + 512 * 2 * 2 * 64, rel=1e-3)
    assert many[1] == 512 * one[1]
    assert decode_bytes(MIXTURE, ("A",) * 4, 1, 8, 2) < 2 * MIXTURE.parameters()
    assert activation_bytes(MIXTURE, 2) == activation_bytes(DENSE, 2) == 256 * 6 + 16 * (128 + 64)


def test_a_mixture_of_experts_is_profiled_and_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr("nasbench.runtime.roofline.BUFFER_BYTES", ByDevice(cpu=1 << 20))
    todo = prepare(MIXTURE, "A", [64], [1], db=tmp_path, chunk=32, seconds_per_row=0.001, isolate=False)
    rows = read_db(run(todo).path)
    experts = [row for row in rows if row.block == "moe"]
    assert {(row.args, row.mode, row.status) for row in experts} == {
        ("8x2x32", "decode", "ok"),
        ("8x2x32", "prefill", "ok"),
    }
    costs = CostModel(rows, MIXTURE, "fp32")
    found = costs.cost(("A",) * 4, 64, 1)
    assert found.decode_tok_s > 0
    assert found.prefill_tok_s > 0


@pytest.mark.parametrize("post_norms", [False, True])
def test_a_step_is_the_sum_of_its_blocks(post_norms):
    shape = replace(MIXTURE, post_norms=post_norms)
    us = {"embedding": 1.0, "norm": 2.0, "mlp": 3.0, "moe@8x2x32": 5.0, "head": 7.0, "A": 11.0}
    rows = [
        Row(device="dev", **block_cells(shape, name), context=64 * (name == "A"), p20_us=time, p50_us=time, p80_us=time)
        for name, time in us.items()
    ]
    counts = Counter({"embedding": 1, "norm": 15 if post_norms else 8, "mlp": 1, "moe@8x2x32": 2, "head": 1, "A": 4})
    expected = sum(us[name] * count for name, count in counts.items())
    assert CostModel(rows, shape, "fp32").decode(("A",) * 4, 64, 1).step_ms == pytest.approx(expected / 1e3)
