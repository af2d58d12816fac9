"""Every stream against the reference stream, outputs and every gradient; test_contract_phases.py has each mixer."""

import copy

import pytest
import torch
from stream_cases import DEVICE, compare, decoder, needs_triton, outcome, plain
from tolerances import BF16, CACHE_FP32, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

from nasbench.model.packed import PackedProjections
from nasbench.model.stream import (
    DecodeManyStream,
    DecodeOneStream,
    PromptStream,
    ReferenceStream,
    TrainStream,
    stream_for,
)

__all__ = ["plain"]
pytestmark = needs_triton


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
    "moe": {"ffn": ("moe@4x2x24+1", "none", "moe@3x1x16:raw")},
    "rwkv": {"ffn": ("channelmix@40", "none", "channelmix@40")},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("further", FURTHER)
@torch.no_grad()
def test_prompts_and_steps(further, batch, plain):
    """Chunks, then steps at equal and at own positions."""
    model = decoder("R C R" if further == "rwkv" else "A W16 A", published_placement="A W16 A", **FURTHER[further])
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
