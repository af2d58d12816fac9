"""Full attention and the sliding window against a written-out softmax."""

import pytest
import torch
from mixer_cases import SHAPES, build, in_chunks, inputs, new_cache, whole
from tolerances import BF16, CACHE_FP32, relative_rmse

from nasbench.model import LayerShape
from nasbench.model.mixers.attention.mixer import LONG_ON_CPU, decode_attention
from nasbench.model.mixers.sliding_window.mixer import windowed_attention
from nasbench.model.rotary import apply_rotary, rotary_tables


def plain_attention(q, k, v, window):
    """softmax(q k^T / sqrt(D)) v in float64, keys and values repeated, a T x N mask: no shortcut of any kind."""
    group, tokens, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    query = torch.arange(keys - tokens, keys)[:, None]
    seen = (torch.arange(keys) <= query) & (torch.arange(keys) > query - window)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 9), (2, 200), (65, 0), (130, 63), (200, 3)])
@pytest.mark.parametrize("window", [1, 3, 64, 65, 1000])
def test_windowed_attention(tokens, past, window):
    torch.manual_seed(0)
    q = torch.randn(2, 6, tokens, 8)
    k, v = torch.randn(2, 2, 2, tokens + past, 8)
    assert relative_rmse(windowed_attention(q, k, v, window), plain_attention(q, k, v, window)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "past"), [(1, 9), (2, 200), (65, 0), (130, 63), (200, 3)])
@pytest.mark.parametrize("window", [1, 3, 64, 65, 1000])
def test_windowed_attention_by_flash_attention(tokens, past, window):
    torch.manual_seed(0)
    q = torch.randn(2, 6, tokens, 8).bfloat16()
    k, v = torch.randn(2, 2, 2, tokens + past, 8).bfloat16()
    got = windowed_attention(q.cuda(), k.cuda(), v.cuda(), window).cpu()
    assert got.shape == q.shape
    assert relative_rmse(got, plain_attention(q, k, v, window)) < BF16


@pytest.mark.parametrize("keys", [1, 100, LONG_ON_CPU])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, BF16)])
def test_decode_attention_reads_only_unmasked_keys(keys, dtype, tolerance):
    torch.manual_seed(0)
    q = torch.randn(3, 6, 1, 8).to(dtype)
    k, v = torch.randn(2, 3, 2, keys + 9, 8).to(dtype)[:, :, :, :keys]
    assert relative_rmse(decode_attention(q, k, v, None), plain_attention(q, k, v, keys + 1)) < tolerance
    lengths = torch.tensor([keys, max(1, keys // 2), 1])
    got = decode_attention(q, k, v, torch.arange(keys) < lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        one = [tensor[row : row + 1] for tensor in (q, k[:, :, :length], v[:, :, :length])]
        assert relative_rmse(got[row : row + 1], plain_attention(*one, keys + 1)) < tolerance


@torch.no_grad()
def test_a_window_of_the_whole_sequence_is_full_attention():
    full, wide, narrow = build("A"), build("W40"), build("W39")
    x = inputs(full.spec, 2, 40)
    assert relative_rmse(whole(wide, x), whole(full, x)) < CACHE_FP32
    difference = (whole(narrow, x) - whole(full, x)).abs().amax((0, 2))
    assert difference[:39].max() < 1e-5 < difference[39]


@torch.no_grad()
def test_the_ring_holds_each_key_at_its_position_modulo_the_window():
    ring, full = build("W7"), build("A")
    x = inputs(ring.spec, 1, 20)
    caches = new_cache(ring, 1, 20), new_cache(full, 1, 20)
    for mixer, cache in zip((ring, full), caches, strict=True):
        in_chunks(mixer, x, [3, 9, 8], cache)
    positions = torch.arange(13, 20)
    for name in ("keys", "values"):
        torch.testing.assert_close(caches[0].state[name][:, :, positions % 7], caches[1].state[name][:, :, positions])


def test_rotation_depends_on_distance_only():
    shape = LayerShape(32, 1, 1, 32, 64, rope_theta=100.0)
    q, k = torch.randn(2, 32)
    products = []
    for first in (0, 17):
        cos, sin = rotary_tables(shape.rotary, torch.tensor([first, first + 5]))
        products.append(apply_rotary(q, cos[0], sin[0]) @ apply_rotary(k, cos[1], sin[1]))
    torch.testing.assert_close(*products)


def test_llama3_scaling_slows_only_long_wavelengths():
    plain = LayerShape(64, 1, 1, 64, 1 << 17, rope_theta=500_000.0)
    scaled = LayerShape(64, 1, 1, 64, 1 << 17, rope_theta=500_000.0, rope_scaling=("llama3", 32.0, 1.0, 4.0, 8192.0))
    one = torch.tensor([1])
    angle, scaled_angle = (rotary_tables(shape.rotary, one)[1][0, :32].double().asin() for shape in (plain, scaled))
    assert torch.equal(angle[:8], scaled_angle[:8])
    torch.testing.assert_close(scaled_angle[-1], angle[-1] / 32, rtol=1e-4, atol=0)
    assert (scaled_angle <= angle).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mixer_is_the_written_out_formula(shape):
    mixer = build("A", SHAPES[shape]).double()
    config = mixer.spec.shape
    x = inputs(mixer.spec, 2, 11).double()
    q, k, v = (
        norm(project(x).unflatten(-1, (-1, config.head_dim))).transpose(1, 2)
        for project, norm in ((mixer.q_proj, mixer.q_norm), (mixer.k_proj, mixer.k_norm), (mixer.v_proj, lambda y: y))
    )
    cos, sin = rotary_tables(config.rotary, torch.arange(11))
    mixed = plain_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, 99)
    expected = mixer.o_proj(mixed.transpose(1, 2).flatten(2))
    assert relative_rmse(whole(mixer, x), expected) < 1e-6
