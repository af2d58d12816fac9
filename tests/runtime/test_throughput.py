"""End-to-end measurement: what it reports is what it did."""

import pytest
import torch

from nasbench.checkpoints.load import random_decoder
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import MachineError, UserError
from nasbench.model import decoder as decoder_module
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.runtime import memory, throughput
from nasbench.runtime import roofline as floor
from nasbench.runtime.roofline import Ceilings, decode_bytes, decode_floor
from nasbench.runtime.throughput import measure

SHAPE = ModelSpec("test", "llama", 3, 32, 48, 4, 2, 8, 97, 64, 1e4, 1e-5, defaults=(("W", "5"),))
PLACEMENT = ("A", "W", "J")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(floor, "BUFFER_BYTES", ByDevice(cpu=1 << 22, cuda=1 << 28))
    monkeypatch.setattr(floor, "MATRIX", ByDevice(cpu=128, cuda=1024))


@pytest.mark.parametrize("device", DEVICES)
def test_result(device):
    result = measure(SHAPE, PLACEMENT, context=40, batch=3, device=device, dtype=torch.bfloat16, seconds=0.05, chunk=16)
    assert result.placement == "A W J"
    assert (result.context, result.batch, result.dtype, result.prefill_context) == (40, 3, "bf16", 40)
    assert result.cache_bytes == SHAPE.cache_bytes(PLACEMENT, 3, 40)
    assert result.step_p20_ms <= result.step_ms <= result.step_p80_ms
    assert result.decode_tok_s == pytest.approx(3 / result.step_ms * 1e3)
    assert result.prefill_tok_s == pytest.approx(120 / result.prefill_s)
    assert result.floor_ms == pytest.approx(sum(result.floor_parts_ms.values()))
    assert set(result.floor_parts_ms) == {"matrix products", "keys and values", "recurrent states"}
    assert result.floor_fraction == pytest.approx(result.floor_ms / result.step_ms)
    assert result.source == "measured"
    assert result.repeats >= 7
    assert (result.launches is None) == (device == "cpu")
    needed = {"decode_tok_s", "prefill_tok_s", "step_ms", "cache_bytes", "source", "peak_bytes", "copy_gb_s"}
    assert needed <= set(result.as_dict())


def test_steps_read_exactly_the_context_and_different_tokens(monkeypatch):
    spans, fed = [], []
    original = decoder_module.Decoder._step

    def spy(self, tokens, step, cache):
        spans.append((step.max_seqlen, step.equal_lengths))
        fed.append(tokens.tolist())
        assert all(bool(state.any()) for mixer in cache.kept for state in mixer.state.values()), "an empty cache"
        return original(self, tokens, step, cache)

    monkeypatch.setattr(decoder_module.Decoder, "_step", spy)
    measure(SHAPE, PLACEMENT, context=33, batch=2, seconds=0.02, prefill_context=None)
    assert set(spans) == {(33, True)}
    assert fed[0] != fed[1]


def test_decode_bytes_by_hand():
    """One untied model of one full-attention layer, counted from its own tensors."""
    shape = ModelSpec("one", "llama", 1, 32, 48, 4, 2, 8, 97, 64, 1e4, 1e-5, tie_embeddings=False)
    decoder = random_decoder(shape, ("A",))
    weights = sum(p.numel() for name, p in decoder.named_parameters() if "embed_tokens" not in name)
    keys_and_values = 2 * 3 * 2 * 20 * 8
    assert decode_bytes(shape, ("A",), 3, 20, 2) == 2 * (weights + 3 * 32 + keys_and_values)
    tied = MODELS["smollm2-135m"]
    assert decode_bytes(tied, tied.placement, 1, 1, 2) == 2 * 134_515_008 + 2 * 2 * 30 * 3 * 64


def test_a_given_decoder_is_measured():
    decoder = random_decoder(SHAPE, PLACEMENT, seed=1)
    result = measure(SHAPE, PLACEMENT, context=20, batch=1, decoder=decoder, seconds=0.02, prefill_context=8)
    assert result.dtype == "fp32"
    assert result.prefill_context == 8


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory")])
def test_largest_batch_is_confirmed(monkeypatch, error):
    """The memory model says 10; the machine refuses more than 4, by torch's allocator or by what CUDA allocates."""
    monkeypatch.setattr(throughput, "largest_batch", lambda *_, **__: 10)
    original = decoder_module.Decoder.new_cache

    def refuses(self, batch, context):
        if batch > 4:
            raise error
        return original(self, batch, context)

    monkeypatch.setattr(decoder_module.Decoder, "new_cache", refuses)
    result = measure(SHAPE, PLACEMENT, context=20, batch="max", seconds=0.02, prefill_context=None)
    assert result.batch == 4
    with pytest.raises(MachineError, match="7 sequences of 20 tokens do not fit"):
        measure(SHAPE, PLACEMENT, context=20, batch=7, seconds=0.02, prefill_context=None)


def test_what_cannot_fit_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2_000_000)
    with pytest.raises(MachineError, match=r"batch 100000 of 64 tokens fits.*the largest batch is \d+"):
        measure(SHAPE, PLACEMENT, context=64, batch=100_000)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    with pytest.raises(MachineError, match="not one sequence"):
        measure(SHAPE, PLACEMENT, context=64, batch="max")


def test_prefill_halves_a_chunk_that_does_not_fit(monkeypatch):
    original = throughput.prefill
    seen = []

    def refuses(decoder, tokens, cache, chunk):
        seen.append(chunk)
        if chunk > 128:
            raise torch.OutOfMemoryError("no room")
        return original(decoder, tokens, cache, chunk)

    monkeypatch.setattr(throughput, "prefill", refuses)
    result = measure(SHAPE, PLACEMENT, context=20, batch=1, seconds=0.02, chunk=512)
    assert result.prefill_chunk == 128
    assert seen[:3] == [512, 256, 128]


def test_bad_input():
    for options, message in (
        ({"context": 65}, "context 65 is beyond test's"),
        ({"context": 0}, "context 0"),
        ({"context": 20, "prefill_context": 30}, "prefill context 30"),
        ({"context": 20, "batch": 0}, "bad batch 0"),
    ):
        with pytest.raises(UserError, match=message):
            measure(SHAPE, PLACEMENT, **({"batch": 1} | options))


def test_ceilings_are_plausible():
    ceilings = floor.measure_ceilings("cpu", 1 << 30, torch.float32)
    for rate in (ceilings.read_gb_s, ceilings.copy_gb_s, ceilings.in_place_gb_s):
        assert 0.1 < rate < 10_000
    assert 1e-4 < ceilings.matmul_tflop_s < 10_000


def test_the_floor_by_hand():
    """Jet-Nemotron-2B at 64K, batch 128: the figures of the published limit, 17.4 GB of keys and values, 3.9 GB of
    weights, 7.2 GB of states read and written."""
    shape = MODELS["jet-nemotron-2b"]
    placement = shape.placement
    parts = {p.name: p for p in decode_floor(shape, placement, 128, 65536, 2, Ceilings(4500, 4100, 4220, 770))}
    assert parts["keys and values"].nbytes == pytest.approx(17.4e9, rel=0.02)
    assert parts["keys and values"].ms == pytest.approx(3.87, rel=0.02)
    assert parts["matrix products"].nbytes == pytest.approx(3.9e9, rel=0.03)
    assert parts["recurrent states"].nbytes == pytest.approx(7.25e9, rel=0.02)
    assert parts["recurrent states"].ms == pytest.approx(1.72, rel=0.02)
    # At batch 1024 the products are bound by arithmetic, not by reading the weights.
    parts = {p.name: p for p in decode_floor(shape, placement, 1024, 4096, 2, Ceilings(4500, 4100, 4220, 770))}
    products = parts["matrix products"]
    assert products.ms == pytest.approx(products.flops / 770e9)
    assert products.ms > products.nbytes / 4500e6
