"""benchmarks/train.py on a tiny model, and the FLOPs that it counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from supernet_tiny import SHAPE
from torch import nn

import benchmarks.train as benchmark
from nasbench.checkpoints.load import random_decoder
from nasbench.spaces.placement import parse_placement

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train.py"


def test_speeds_of_both_stages_are_told(tiny_model, tmp_path):
    out = tmp_path / "train.json"
    command = [
        *(sys.executable, SCRIPT, "--model", tiny_model, "--blocks", "W8,J", "--sequence", "32", "--align", "128"),
        *("--supernet", "64,128", "--steps", "2", "--device", "cpu", "--dtype", "fp32", "--out", out, "--documents"),
    ]
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True).stdout
    rows = json.loads(out.read_text())
    assert [(row["stage"], row["step_tokens"], row["documents"]) for row in rows] == [
        (stage, size, True) for stage, size in (("align", 128), ("supernet", 64), ("supernet", 128))
    ]
    for row in rows:
        assert row["tok_s"] == pytest.approx(row["step_tokens"] / row["step_ms"] * 1e3)
        assert row["utilisation"] == pytest.approx(row["model_tflop_s"] / row["product_tflop_s"])
        assert row["kernels"]
    assert said.count("tokens/s") == 3


def test_processes_of_torchrun_share_a_step(tiny_model, tmp_path):
    """Told once, of all tokens; every process holds its share of the weights."""
    out = tmp_path / "train.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT),
        *("--model", tiny_model, "--blocks", "W8,J", "--sequence", "32", "--align", "128", "--supernet", "128"),
        *("--steps", "1", "--device", "cpu", "--dtype", "fp32", "--out", out, "--shard"),
    ]
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True).stdout
    assert said.count("tokens/s") == 2
    for row in json.loads(out.read_text()):
        assert (row["processes"], row["shard"], row["step_tokens"]) == (2, True, 128)
        assert row["utilisation"] == pytest.approx(row["model_tflop_s"] / row["product_tflop_s"] / 2)


def test_model_flops_are_those_of_the_products():
    """Of a forward pass of full attention: two for every weight of a projection and token, four for every channel of a
    query and key that it sees."""
    decoder = random_decoder(SHAPE, parse_placement("4A"))
    rows, sequence = 2, 128
    linears = [part for part in decoder.model.layers.modules() if isinstance(part, nn.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    seen = sequence * (sequence + 1) / 2
    expected = 2 * rows * sequence * weights + 4 * rows * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim * seen
    assert benchmark.step_flops(SHAPE, rows, sequence, ()) == pytest.approx(expected, rel=0.01)


def test_built_in_shapes_have_random_weights():
    """Frozen, as those of a model that is read."""
    found = benchmark.model_of("qwen2.5-1.5b", torch.bfloat16, "meta")
    assert found.shape.name == "qwen2.5-1.5b"
    assert {parameter.dtype for parameter in found.decoder.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in found.decoder.parameters())
