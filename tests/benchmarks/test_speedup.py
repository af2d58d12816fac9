"""benchmarks/speedup.py: what is measured, and the table that comes of it."""

import pytest
import torch

import benchmarks.speedup as bench
from nasbench.checkpoints.load import random_decoder
from nasbench.core.errors import MachineError, UserError
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.runtime import throughput
from nasbench.runtime.roofline import Ceilings
from nasbench.runtime.throughput import measure_prefill

TINY = ModelSpec("test", "llama", 3, 32, 48, 4, 2, 8, 97, 64, 1e4, 1e-5, defaults=(("W", "5"),))
CEILINGS = Ceilings(4500, 4100, 4220, 770)


def point(model, context, batch, what, tok_s, fraction=0.5):
    ms = batch * (context if what == "prefill" else 1) / tok_s * 1e3
    return bench.Point(model, context, what, batch, tok_s, ms, ms * fraction)


def test_ratios_and_limits():
    lines = bench.table(
        [
            point(bench.SLOW, 4096, 100, "decode", 2000.0, 0.5),
            point(bench.SLOW, 4096, 8, "prefill", 50_000.0, 0.5),
            point(bench.FAST, 4096, 1024, "decode", 40_000.0, 0.8),
            point(bench.FAST, 4096, 100, "decode, same batch", 10_000.0, 0.4),
            point(bench.FAST, 4096, 8, "prefill", 60_000.0, 0.25),
            point(bench.SLOW, 65536, 10, "decode", 150.0),
        ]
    )
    # At their rooflines: 50,000 over 4,000, 25,000 over 4,000, 240,000 over 100,000.
    assert lines[2:5] == [
        "| decode | 4k | 1024 | 40,000 (0.80) | 100 | 2,000 (0.50) | 20 | 15.6 | 12.5 |",
        "| decode, same batch | 4k | 100 | 10,000 (0.40) | 100 | 2,000 (0.50) | 5 |  | 6.25 |",
        "| prefill | 4k | 8 | 60,000 (0.25) | 8 | 50,000 (0.50) | 1.2 | 1.14 | 2.4 |",
    ]
    assert not any("64k" in line for line in lines)


def test_what_is_wanted():
    points = [point(bench.SLOW, 4096, 100, "decode", 2000.0)]
    assert bench.wanted(bench.SLOW, 4096, [], 131072) == {"decode": ["max"], "prefill": [32]}
    assert bench.wanted(bench.FAST, 4096, points, 1024) == {
        "decode": [1024, "max"], "decode, same batch": [100], "prefill": [1],
    }  # fmt: skip
    assert bench.wanted(bench.FAST, 65536, points, 131072) == {"decode": [128, "max"], "prefill": [2]}


def test_the_first_batch_that_fits_is_measured(monkeypatch):
    monkeypatch.setattr(throughput, "largest_batch", lambda *_, **__: 3)
    decoder = random_decoder(TINY, ("A", "W", "J"))
    shown = bench.measure(decoder, 32, "decode", [7, "max"], 0.01, CEILINGS)
    assert (shown.model, shown.batch) == ("test", 3)
    assert shown.tok_s == pytest.approx(3e3 / shown.ms)
    with pytest.raises(MachineError, match="batch 7 of 32 tokens fits"):
        bench.measure(decoder, 32, "decode", [7], 0.01, CEILINGS)
    shown = bench.measure(decoder, 32, "prefill", [2], 0.01, CEILINGS)
    assert shown.tok_s == pytest.approx(64e3 / shown.ms)


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
