"""The kernels that the profiler times for a decode step on a GPU are those that the engine's fused step launches."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nasbench.checkpoints.load import random_decoder
from nasbench.model import fused
from nasbench.model.shapes import ModelSpec
from nasbench.profiling import fused_calls
from nasbench.profiling.plan import Point
from nasbench.profiling.workload import Bench, build
from nasbench.runtime.fused_step import FusedStep

TINY = ModelSpec("tiny", "qwen3", 4, 64, 128, 4, 2, 16, 256, 512, 1e4, 1e-5, qk_norm=True, defaults=(("W", "32"),))


class Recorder:
    """Stands in for the kernels: writes down what is launched and on what sizes."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple] = []
        plain = F.linear

        def linear(x, weight, bias=None):
            self.log.append(("linear", tuple(x.shape), tuple(weight.shape), bias is not None))
            return plain(x, weight, bias)

        monkeypatch.setattr(F, "linear", linear)
        monkeypatch.setattr(fused, "usable", lambda x: True)
        monkeypatch.setattr(fused, "ops", lambda: self)
        monkeypatch.setattr(fused, "workspace", lambda device: None)

    def RowLayout(self, *begins):
        return begins

    def gemv(self, x, weight, bias=None, *, before="", norm_weight=None, eps=0.0, swiglu=False, add_to=None):
        self.log.append(("gemv", tuple(x.shape), tuple(weight.shape), before, swiglu, add_to is not None))
        return torch.ones(1, weight.shape[0] // (2 if swiglu else 1)) if add_to is None else add_to

    def add_norm(self, x, delta, weight, eps):
        self.log.append(("add_norm", x.numel()))
        return x

    def swiglu(self, row):
        self.log.append(("swiglu", tuple(row.shape)))
        return row[..., : row.shape[-1] // 2]

    def fits(self, x):
        return True

    def swiglu_product(self, x, weight):
        self.log.append(("swiglu_product", tuple(x.shape), tuple(weight.shape)))
        return x.new_zeros(x.shape[0], weight.shape[0] // 2)

    def streams(self, x, weight, divided=False):
        return divided

    def batch_product(self, x, weight, bias=None, divided=False):
        self.log.append(("batch_product", tuple(x.shape), tuple(weight.shape), bias is not None, divided))
        return x.new_zeros(2, len(x), len(weight)) if divided else x.new_zeros(len(x), len(weight))

    def argmax(self, logits):
        return logits.argmax(-1)

    def silu_part(self, row, at, size):
        self.log.append(("silu_part", tuple(row.shape), size))
        return row[:, at : at + size]

    def conv_step(self, row, weight, history):
        self.log.append(("conv_step", tuple(row.shape), tuple(weight.shape)))

    def rotary_write(self, row, positions, cos, sin, keys, values, heads, *norms, eps):
        where = (tuple(positions.shape), tuple(cos.shape), cos.stride())
        self.log.append(("rotary_write", tuple(row.shape), where, tuple(keys.shape), norms[0] is not None))
        return torch.ones(len(row), heads, keys.shape[-1])

    def decode_attention(self, q, keys, values, positions, span):
        self.log.append(("decode_attention", tuple(q.shape), tuple(keys.shape), span, positions.tolist()))
        return q

    def recurrent_step(self, row, layout, state, *rest):
        self.log.append(("recurrent_step", tuple(row.shape), layout, tuple(state.shape)))
        return torch.ones(len(row), state.shape[1] * state.shape[3])


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_a_steps_kernels_are_those_of_its_blocks(batch, monkeypatch):
    recorder = Recorder(monkeypatch)
    placement, context = ("A", "W", "J", "G"), 48
    decoder = random_decoder(TINY, placement)
    cache = decoder.new_cache(batch, context)
    tokens, positions = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), context - 1)
    FusedStep(decoder, cache, context)(tokens, positions)
    engine, recorder.log = recorder.log, []

    bench = Bench(TINY, "cpu", torch.float32, 1 << 16, 1 << 30)
    recorder.log = []
    reasons = set()

    def call(block: str) -> None:
        workload = build(bench, Point(block, "decode", batch, 0 if len(block) > 1 else context))
        reasons.add(workload.reason)
        for one in workload.calls[:1]:
            one()

    call("embedding")
    for name in placement:
        for block in ("norm", name, "norm", "mlp"):
            call(block)
    call("norm")
    call("head")
    assert recorder.log == engine
    assert len(engine) > 20
    assert reasons == ({"", fused_calls.NO_CALL} if batch == 1 else {""})


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_a_chunks_kernels_are_those_of_its_blocks(batch, monkeypatch):
    recorder = Recorder(monkeypatch)
    placement, tokens = ("A", "W", "A"), 24
    decoder = random_decoder(TINY, placement)
    cache = decoder.new_cache(batch, tokens)
    decoder.hidden(torch.zeros(batch, tokens, dtype=torch.int64), cache)
    engine, recorder.log = recorder.log, []

    bench = Bench(TINY, "cpu", torch.float32, 1 << 16, 1 << 30)

    def call(block: str) -> None:
        workload = build(bench, Point(block, "prefill", batch, 0 if len(block) > 1 else tokens, tokens))
        workload.calls[0]()

    call("embedding")
    for name in placement:
        for block in ("norm", name, "norm", "mlp"):
            call(block)
    call("norm")
    assert recorder.log == engine
    assert len(engine) > 10


@torch.inference_mode()
def test_a_kind_without_fused_form_takes_its_own_step(monkeypatch):
    recorder = Recorder(monkeypatch)
    seen = []
    mixer = SimpleNamespace(step=lambda x, step, cache: seen.append(tuple(x.shape)) or torch.ones_like(x))
    norm = torch.nn.RMSNorm(8)
    alone = torch.zeros(1, 8)
    fused_calls.mixer_call(mixer, norm, alone, None, None)
    assert alone.tolist() == [[1.0] * 8]
    assert fused_calls.mixer_call(mixer, norm, torch.zeros(2, 8), None, None).shape == (2, 8)
    assert seen == [(1, 1, 8), (2, 1, 8)]
    assert recorder.log == []
