"""Every stream against the reference stream, outputs and every gradient; kernels run in Triton's interpreter."""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from tolerances import BF16, CACHE_FP32, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

from nasbench.model import fused
from nasbench.model.decoder import Decoder
from nasbench.model.documents import Documents
from nasbench.model.packed import PackedProjections
from nasbench.model.shapes import ModelSpec
from nasbench.model.stream import (
    DecodeManyStream,
    DecodeOneStream,
    PromptStream,
    ReferenceStream,
    TrainStream,
    stream_for,
)
from nasbench.spaces.placement import parse_placement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
AGES = torch.tensor([[*range(30), *range(40)], [*range(64), *range(6)]], dtype=torch.int32)


def decoder(placement, dtype=torch.float32, head_dim=16, **further):
    placement = parse_placement(placement)
    shape = ModelSpec(
        name="tiny", family="llama", num_layers=len(placement), hidden_size=48, intermediate_size=72, num_heads=3,
        num_kv_heads=1, head_dim=head_dim, vocab_size=97, max_context=256, rope_theta=10000.0, rms_eps=1e-5,
        **further,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(shape, placement).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def outcome(form, module, x):
    """Output, and gradients of the input and of every parameter, by name."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = form(x)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(x.device)
    (output.float() * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input": x.grad, **found}


def compare(fast, slow, tolerance):
    assert fast.keys() == slow.keys()
    for name in slow:
        assert relative_rmse(fast[name].float(), slow[name].float()) < tolerance, name


@pytest.fixture
def plain(monkeypatch):
    """The kernels run wherever the test does; `plain(work)` is what PyTorch alone computes."""
    monkeypatch.setattr(fused, "autograd_kernels", lambda x: True)

    def without_kernels(work):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "autograd_kernels", lambda x: False)
            return work()

    return without_kernels


def test_each_phase_has_its_stream(plain):
    model = decoder("A")
    x, sequence = torch.zeros(2, 5, 48), model.sequence_meta(0, 5)
    step = model.step_meta(torch.zeros(2, dtype=torch.int64), 8)
    assert type(stream_for(x, sequence)) is TrainStream
    with torch.no_grad():
        assert type(stream_for(x, sequence)) is PromptStream
        assert type(stream_for(x, sequence, in_place=False)) is TrainStream
        assert type(stream_for(x[:, :1], step)) is DecodeManyStream
        assert type(stream_for(x[:1, :1], step)) is DecodeOneStream
        assert plain(lambda: type(stream_for(x, sequence))) is ReferenceStream


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", ["A", "W24", "G", "J", "R", "C"])
def test_training_a_layer(name, documents, plain):
    model = decoder(name)
    layer, meta = model.layers[0], model.sequence_meta(0, 70, Documents(AGES.to(DEVICE)) if documents else None)
    x = torch.randn(2, 70, 48).to(DEVICE)
    slow = plain(lambda: outcome(lambda x: layer(x, meta), layer, x))
    compare(outcome(lambda x: layer(x, meta), layer, x), slow, GRADIENT_FP32)
    with torch.no_grad():
        before = x.clone()
        assert relative_rmse(layer(x, meta), slow["output"]) < CHUNKED_FP32
        assert torch.equal(x, before), "a layer leaves its input as it is"


@pytest.mark.parametrize("learns", [False, True])
def test_training_an_ffn(learns, plain):
    model = decoder("A")
    ffn, meta = model.layers[0].mlp.requires_grad_(learns), model.sequence_meta(0, 33)
    x = torch.randn(2, 33, 48).to(DEVICE)
    slow = plain(lambda: outcome(lambda x: ffn(x, meta), ffn, x))
    compare(outcome(lambda x: ffn(x, meta), ffn, x), slow, GRADIENT_FP32)


def test_projections_with_biases_and_odd_sizes():
    linears = [torch.nn.Linear(12, size).to(DEVICE) for size in (5, 8, 2)]
    packed, x = PackedProjections(linears), torch.randn(3, 4, 12).to(DEVICE)
    module = torch.nn.ModuleList(linears)
    fast = outcome(lambda x: packed.aligned(x)[..., :15], module, x)
    compare(fast, outcome(lambda x: torch.cat([linear(x) for linear in linears], -1), module, x), CHUNKED_FP32)


FURTHER = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma": {"post_norms": True, "activation": "gelu_tanh", "embedding_scale": 7.0, "window_rope_theta": 100.0},
    "moe": {"ffn": ("moe@4x2x24+1", "gated", "moe@3x1x16:raw", "none")},
    "rwkv": {"ffn": ("channelmix@40", "none", "channelmix@40", "gated")},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("further", FURTHER)
@torch.no_grad()
def test_prompts_and_steps(further, batch, plain):
    """Chunks, then steps at equal and at own positions, of a model with layers of several kinds."""
    placement = "M R C R" if further == "rwkv" else "A W16 J G"
    model = decoder(placement, published_placement="A W16 2A", **FURTHER[further])
    text = torch.randint(0, 97, (batch, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = plain(lambda: model(text))
    assert relative_rmse(model(text), wanted) < CACHE_FP32
    cache = model.new_cache(batch, 48)
    parts = [model(part, cache) for part in text[:, :36].split([1, 24, 11], 1)]
    parts += [model.step(text[:, t], cache)[:, None] for t in (36, 37)]
    for t in (38, 39):
        positions = torch.full((batch,), t, device=DEVICE)
        parts.append(model.step_at(text[:, t], positions, cache)[:, None])
    assert relative_rmse(torch.cat(parts, 1), wanted) < CACHE_FP32


@torch.no_grad()
def test_a_blocks_output_is_what_it_adds(plain):
    model = decoder("A J", ffn=("moe@4x2x24+1", "gated"))
    for sublayer in model.sublayers:
        for batch, tokens in ((2, 5), (2, 1), (1, 1)):
            x = torch.randn(batch, tokens, 48).to(DEVICE)
            if tokens == 1:
                meta = model.step_meta(torch.zeros(batch, dtype=torch.int64, device=DEVICE), 8)
                caches = [sublayer.block.new_cache(batch, 8, device=DEVICE, dtype=x.dtype) for _ in range(2)]
            else:
                meta, caches = model.sequence_meta(0, tokens), [None, None]
            wanted = plain(lambda: sublayer.block(x, meta, caches[0]))  # noqa: B023
            assert relative_rmse(sublayer.block(x.clone(), meta, caches[1]), wanted) < CACHE_FP32


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["A", "W24", "W256"])
@pytest.mark.parametrize("learns", [False, True])
def test_attention_by_flash(name, learns):
    """In bf16, against the same mixer in fp32: both round, and neither is the other's truth."""
    model = decoder(name, head_dim=64)
    meta = model.sequence_meta(0, 130)
    mixer, x = model.layers[0].self_attn.requires_grad_(learns), torch.randn(2, 130, 48).cuda()
    slow = outcome(lambda x: mixer(x, meta), mixer, x)
    mixer = copy.deepcopy(mixer).to(torch.bfloat16)
    compare(outcome(lambda x: mixer(x, meta), mixer, x.bfloat16()), slow, 2 * BF16)
    with torch.no_grad():
        assert relative_rmse(mixer(x.bfloat16(), meta).float(), slow["output"]) < 2 * BF16
