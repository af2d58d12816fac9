"""RWKV7: its decode kernels against the plain form, and what it takes from an attention."""

import pytest
import torch
from mixer_cases import PLAIN, SHAPES, build, chunk, in_chunks, inputs, new_cache, step, whole
from tolerances import BF16, CACHE_FP32, relative_rmse

from nasbench.core.errors import UserError
from nasbench.model import FFNS, mixer_spec
from nasbench.model.documents import Documents
from nasbench.model.mixers.attention.mixer import FullAttention


def test_arguments():
    assert mixer_spec("R", PLAIN).args == "6x8"
    assert mixer_spec("R@32x64x16", PLAIN).args == "32x64x16"
    assert mixer_spec("R@32x64x16", PLAIN).cache_bytes(1, 0) == 32 * 64 * 64 * 2
    for text, said in (("32", "heads"), ("32x64x8", "32 bits"), ("32x64x16x2", "heads")):
        with pytest.raises(UserError, match=said):
            mixer_spec(f"R@{text}", PLAIN)


@pytest.mark.parametrize(("name", "batch"), [("R", 1), ("R@8x6", 3), ("R@4x12x16", 2)])
@torch.no_grad()
def test_steps_by_kernels_equal_the_plain_ones(name, batch):
    pytest.importorskip("triton")
    bound = BF16 if name.endswith("x16") else CACHE_FP32  # the interpreter rounds to bf16 in its own way
    mixer = build(name)
    x = inputs(mixer.spec, batch, 10)
    caches = [new_cache(mixer, batch, 10) for _ in range(2)]
    for cache in caches:
        in_chunks(mixer, x[:, :8], [8], cache)
    for t in range(8, 10):
        meta, row = step(torch.full((batch,), t), t + 1, True), x[:, t, None].contiguous()
        expected = mixer.core(row, meta, caches[0])[:, 0]
        assert relative_rmse(mixer.decode_core(row, meta, caches[1], None), expected) < bound
    for key, tensor in caches[0].tensors.items():
        assert relative_rmse(caches[1].tensors[key], tensor) < bound, key


@pytest.mark.parametrize("name", ["R", "R@8x6"])
@torch.no_grad()
def test_prompts_by_kernels_equal_the_plain_ones(name):
    pytest.importorskip("triton")
    mixer = build(name)
    for parameter in (mixer.mix, mixer.k_a, mixer.r_k):
        parameter.uniform_()
    x = inputs(mixer.spec, 2, 21)
    assert relative_rmse(mixer.prefill_core(x, chunk(0, 21)), mixer.core(x, chunk(0, 21))) < CACHE_FP32
    caches = [new_cache(mixer, 2, 21) for _ in range(2)]
    for begin, end in ((0, 3), (3, 4), (4, 21)):
        part, meta = x[:, begin:end], chunk(begin, end - begin)
        expected = mixer.core(part, meta, caches[0])
        assert relative_rmse(mixer.prefill_core(part, meta, caches[1]), expected) < CACHE_FP32
    for key, tensor in caches[0].tensors.items():
        assert relative_rmse(caches[1].tensors[key], tensor) < CACHE_FP32, key


@torch.no_grad()
def test_packed_documents_do_not_meet():
    mixer = build("R")
    x = inputs(mixer.spec, 2, 20)
    ages = torch.cat([torch.arange(7), torch.arange(1), torch.arange(12)])[None].expand(2, -1)
    together = mixer(x, chunk(0, 20, documents=Documents(ages)))
    apart = torch.cat([whole(mixer, part) for part in x.split([7, 1, 12], 1)], 1)
    assert relative_rmse(together, apart) < CACHE_FP32


@torch.no_grad()
def test_starts_from_queries_keys_and_values():
    attention = build("A", SHAPES["gqa"], seed=3)
    assert isinstance(attention, FullAttention)
    spec = mixer_spec("R", SHAPES["gqa"])
    mixer = spec.block_class().init_from_attention(spec, attention)
    assert torch.equal(mixer.r_proj.weight, attention.q_proj.weight)
    for ours, theirs in ((mixer.k_proj, attention.k_proj), (mixer.v_proj, attention.v_proj)):
        assert torch.equal(ours.weight, theirs.weight.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1))
    assert torch.equal(mixer.o_proj.weight, attention.o_proj.weight)
    assert not mixer.mix.any()


@torch.no_grad()
def test_channel_mixing_in_chunks_and_steps():
    pytest.importorskip("triton")
    ffn = FFNS["channelmix"].parse(48, 80, "silu", "").build()
    ffn.mix.uniform_()
    x = torch.randn(2, 12, 48)
    expected = ffn(x, chunk(0, 12))
    assert relative_rmse(expected[:, 5:], ffn(x[:, 5:], chunk(0, 7))) > 1e-3
    caches = [new_cache(ffn, 2, 12) for _ in range(2)]
    assert caches[0].conv_state_nbytes == ffn.spec.conv_state_bytes(2, 4)
    for cache in caches:
        assert relative_rmse(in_chunks(ffn, x[:, :9], [4, 5], cache), expected[:, :9]) < CACHE_FP32
    for t in range(9, 12):
        meta, row = step(torch.full((2,), t), t + 1, True), x[:, t, None].contiguous()
        plain = ffn.core(row, meta, caches[0])[:, 0]
        assert relative_rmse(ffn.out(plain), expected[:, t]) < CACHE_FP32
        assert relative_rmse(ffn.decode_core(row, meta, caches[1], None), plain) < CACHE_FP32
