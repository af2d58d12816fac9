"""Latent attention: absorbed steps by kernels, what its arguments say, what it takes from an attention."""

import pytest
import torch
from mixer_cases import PLAIN, SHAPES, build, chunk, in_chunks, inputs, new_cache, step, whole
from tolerances import CACHE_FP32, relative_rmse

from nasbench.core.errors import UserError
from nasbench.model import LayerShape, mixer_spec
from nasbench.model.documents import Documents


def test_arguments():
    assert mixer_spec("C", PLAIN).args == "16x4x8x8"
    spec = mixer_spec("C@512x64x128x128", LayerShape(2048, 16, 16, 128, 64))
    assert spec.cache_bytes(2, 1000) == 2 * 1000 * 576 * 2
    assert spec.rotary.dim == 64
    for text, said in (("512x64", "latent"), ("16x3x8x8", "even"), ("16x4x8x13", "at most")):
        with pytest.raises(UserError, match=said):
            mixer_spec(f"C@{text}", PLAIN)


@pytest.mark.parametrize("name", ["C", "C@10x6x8x12", "C@24x16x16x8"])
@pytest.mark.parametrize("shape", ["gqa", "one-kv"])
@torch.no_grad()
def test_steps_by_kernels_equal_the_plain_ones(name, shape):
    """At equal positions and at own ones, over contexts that are split and that are not."""
    pytest.importorskip("triton")
    mixer = build(name, SHAPES[shape])
    x = inputs(mixer.spec, 2, 300)
    caches = [new_cache(mixer, 2, 300) for _ in range(2)]
    for cache in caches:
        in_chunks(mixer, x[:, :290], [290], cache)
    for positions, span, equal in (([290, 290], 291, True), ([5, 291], 300, False), ([0, 20], 21, False)):
        meta, row = step(torch.tensor(positions), span, equal), mixer.packed(x[:, 291])
        expected = mixer.core(row[:, None], meta, caches[0])[:, 0]
        assert relative_rmse(mixer.decode_core(row, meta, caches[1], None), expected) < CACHE_FP32
    assert relative_rmse(caches[1].state["latents"], caches[0].state["latents"]) < CACHE_FP32


@torch.no_grad()
def test_packed_documents_do_not_meet():
    mixer = build("C")
    x = inputs(mixer.spec, 2, 20)
    ages = torch.cat([torch.arange(7), torch.arange(13)])[None].expand(2, -1)
    together = mixer(x, chunk(0, 20, documents=Documents(ages)))
    assert relative_rmse(together, torch.cat([whole(mixer, part) for part in x.split([7, 13], 1)], 1)) < CACHE_FP32


@torch.no_grad()
def test_sequences_take_turns_where_keys_would_not_fit(monkeypatch):
    mixer = build("C")
    x = inputs(mixer.spec, 3, 9)
    expected = whole(mixer, x)
    monkeypatch.setattr("nasbench.model.mixers.mla.mixer.MOST_EXPANDED", 1)
    assert relative_rmse(whole(mixer, x), expected) < CACHE_FP32


@torch.no_grad()
def test_a_latent_of_full_rank_loses_nothing_of_keys_and_values():
    """Every pair rotates: of one key/value head, keys are the rotary key, and values come back from the latent."""
    shape = LayerShape(48, 4, 1, 8, 64)
    attention = build("A", shape, seed=3)
    spec = mixer_spec("C@9x8x8x8", shape)
    mixer = spec.block_class().init_from_attention(spec, attention)
    x = inputs(spec, 2, 12)
    mixer.kv_a_proj_with_mqa.weight[8] = 0.0
    latent = mixer.kv_a_proj_with_mqa(x)[..., :9]
    _, v = mixer.heads(mixer.kv_b_proj(latent), 8, 8)
    assert relative_rmse(v, attention.v_proj(x)[..., None, :].expand_as(v)) < 1e-5
    # The latents' norm is the only difference: with latents of one size it scales the values alike.
    scaled = x / latent.square().mean(-1, keepdim=True).sqrt()
    error = relative_rmse(whole(mixer, scaled), whole(attention, scaled))
    assert error < 1e-3


@torch.no_grad()
def test_calibration_makes_the_norm_one_factor():
    """Inputs with a common part: values from latents are nearly the attention's, whatever the inputs' size."""
    shape = LayerShape(48, 4, 1, 8, 64)
    attention = build("A", shape, seed=3)
    spec = mixer_spec("C@9x8x8x8", shape)
    common = torch.randn(48, generator=torch.Generator().manual_seed(2))
    x = 0.1 * (common + 0.3 * inputs(spec, 4, 50))
    constant = torch.linalg.lstsq(x.flatten(0, 1).double(), torch.ones(200, 1, dtype=torch.float64)).solution[:, 0]
    errors = []
    for calibrated in (False, True):
        mixer = spec.block_class().init_from_attention(spec, attention)
        if calibrated:
            mixer.load_state_dict(mixer.calibration(constant), strict=False)
        errors.append(relative_rmse(whole(mixer, x), whole(attention, x)))
    assert errors[1] < 0.1 < errors[0]
