"""Linear mixers: published names and shapes, fp32 decays, their formulas, the start from attention."""

import pytest
import torch
from mixer_cases import PLAIN, build, chunk, inputs, whole
from nasbench_kernels.conv import naive_short_conv
from nasbench_kernels.gated_delta import naive_gated_delta
from tolerances import CACHE_FP32, relative_rmse
from torch.nn import functional as F

from nasbench.core.errors import UserError
from nasbench.model import LayerShape, mixer_spec
from nasbench.model.mixers.gated_delta.mixer import (
    LONGEST_HALF_LIFE,
    SHORTEST_HALF_LIFE,
    START_SHARPNESS,
    START_VALUE_SCALE,
)
from nasbench.model.rotary import apply_rotary, rotary_tables
from nasbench.model.shapes import MODELS

PUBLISHED_2B = {
    "q_proj.weight": (1152, 1536),
    "k_proj.weight": (1152, 1536),
    "v_proj.weight": (3072, 1536),
    "g_proj.weight": (3072, 1536),
    "b_proj.weight": (12, 1536),
    "a_proj.weight": (12, 1536),
    "o_proj.weight": (1536, 3072),
    "A_log": (12,),
    "dt_bias": (12,),
    "o_norm.weight": (256,),
    "dynamic_conv1d.kernel_generator.w1.weight": (384, 1536),
    "dynamic_conv1d.kernel_generator.w2.weight": (12288, 384),
    "dynamic_conv1d.kernel_generator.w2.bias": (12288,),
}


def test_jet_block_has_the_published_names_and_shapes():
    with torch.device("meta"):
        mixer = MODELS["jet-nemotron-2b"].mixer("J").build()
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == PUBLISHED_2B


def test_gated_delta_net_has_the_names_of_flash_linear_attention():
    state = build("G").state_dict()
    convolutions = {f"{part}_conv1d.weight" for part in "qkv"}
    shared = {name for name in PUBLISHED_2B if not name.startswith("dynamic_conv1d")}
    assert set(state) == shared | convolutions
    assert state["q_conv1d.weight"].shape == (48, 1, 4)


@pytest.mark.parametrize("name", ["G", "J"])
def test_decay_parameters_stay_fp32(name):
    mixer = build(name)
    before = {key: getattr(mixer, key).detach().clone() for key in ("A_log", "dt_bias")}
    for cast in (lambda: mixer.to(torch.bfloat16), mixer.half, lambda: mixer.to("cpu", torch.bfloat16)):
        cast()
        assert mixer.q_proj.weight.dtype != torch.float32
        for key, value in before.items():
            assert getattr(mixer, key).dtype == torch.float32
            assert torch.equal(getattr(mixer, key), value)
    assert mixer.double().A_log.dtype == torch.float64


@pytest.mark.parametrize(("args", "shape"), [("", PLAIN), ("3x16x4", PLAIN), ("2x8x24", LayerShape(24, 2, 1, 8, 64))])
@torch.no_grad()
def test_jet_block_is_the_formula_of_the_design(args, shape):
    mixer = build(f"J@{args}" if args else "J", shape)
    heads, key_dim, taps = mixer.heads, mixer.key_dim, 4
    x = inputs(mixer.spec, 2, 30)

    def head_vectors(weight):
        y = F.silu(x @ weight.T).unflatten(-1, (heads, key_dim))
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    generator = mixer.dynamic_conv1d.kernel_generator
    kernels = (F.silu(x @ generator.w1.weight.T) @ generator.w2.weight.T + generator.w2.bias).unflatten(-1, (-1, taps))
    v = naive_short_conv(x @ mixer.v_proj.weight.T, kernels).unflatten(-1, (heads, -1))
    g = -mixer.A_log.exp() * F.softplus(x @ mixer.a_proj.weight.T + mixer.dt_bias)
    beta = torch.sigmoid(x @ mixer.b_proj.weight.T)
    o, _ = naive_gated_delta(head_vectors(mixer.q_proj.weight), head_vectors(mixer.k_proj.weight), v, g, beta)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
    expected = (normed.flatten(2) * F.silu(x @ mixer.g_proj.weight.T)) @ mixer.o_proj.weight.T
    assert relative_rmse(whole(mixer, x), expected) < CACHE_FP32


@torch.no_grad()
def test_the_generator_starts_as_the_static_kernel():
    attention = build("A")
    config = mixer_spec("J", PLAIN)
    mixer = config.block_class().init_from_attention(config, attention)
    x = inputs(config, 1, 5)
    generator = mixer.dynamic_conv1d.kernel_generator
    kernels = generator(generator.w1(x))
    assert torch.equal(kernels, torch.tensor([0.0, 0, 0, START_VALUE_SCALE]).expand_as(kernels))


@pytest.mark.parametrize("name", ["G", "J"])
@torch.no_grad()
def test_projections_start_as_the_attentions(name):
    attention = build("A")
    config = mixer_spec(name, PLAIN)
    mixer = config.block_class().init_from_attention(config, attention)
    sharp = START_SHARPNESS if name == "J" else 1.0  # a power of two: exact
    assert torch.equal(mixer.q_proj.weight, sharp * attention.q_proj.weight)
    for ours, theirs, scale in (
        (mixer.k_proj, attention.k_proj, sharp),
        (mixer.v_proj, attention.v_proj, 1.0),
    ):
        for head in range(6):
            kv = theirs.weight.unflatten(0, (2, 8))[head // 3]
            assert torch.equal(ours.weight.unflatten(0, (6, 8))[head], scale * kv)


@torch.no_grad()
def test_heads_of_another_size_copy_their_leading_channels():
    attention = build("A")
    config = mixer_spec("J@4x12x5", PLAIN)
    mixer = config.block_class().init_from_attention(config, attention)
    ours = mixer.q_proj.weight.unflatten(0, (4, 12))
    assert torch.equal(ours[:, :8], START_SHARPNESS * attention.q_proj.weight.unflatten(0, (6, 8))[:4])
    assert 0 < ours[:, 8:].abs().mean() < 1
    wide = mixer_spec("J@6x8x12", PLAIN)
    output = wide.block_class().init_from_attention(wide, attention).o_proj.weight.unflatten(1, (6, 12))
    assert output[..., 8:].abs().max() == 0
    assert output[..., :8].abs().min() > 0


@pytest.mark.parametrize("name", ["G", "J@1x8x8"])
def test_half_lives_are_spread(name):
    mixer = mixer_spec(name, PLAIN).build()
    decay = mixer.A_log.exp() * F.softplus(mixer.dt_bias)
    half_lives = torch.log(torch.tensor(2.0)) / decay
    assert (half_lives >= 0.99 * SHORTEST_HALF_LIFE).all()
    assert (half_lives <= 1.01 * LONGEST_HALF_LIFE).all()
    assert half_lives.unique().numel() == mixer.heads


def conv(x, weight):
    return naive_short_conv(x, weight[:, 0])


def heads(x, count, unit=True):
    x = x.unflatten(-1, (count, -1))
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if unit else x


def low_rank(x, pair):
    return pair[1](x @ pair[0].weight.T)


@torch.no_grad()
def written_out(mixer, x):
    """(q, k, v, log decay, beta, output gate) of D, K, L and T, from the equations of their papers."""
    kind, count = mixer.spec.kind, mixer.heads
    q, k, v = (x @ projection.weight.T for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if kind in "DK":
        q, k, v = (
            conv(part, getattr(mixer, f"{name}_conv1d").weight) for name, part in zip("qkv", (q, k, v), strict=True)
        )
    q, k, v = heads(q, count, kind in "DK"), heads(k, count, kind in "DK"), heads(v, count, False)
    beta = torch.sigmoid(x @ mixer.b_proj.weight.T) if kind in "DK" else None
    if kind == "D":
        return q, k, v, torch.zeros_like(beta), beta, 1.0
    if kind == "K":
        raw = heads(low_rank(x, mixer.f_proj) + mixer.dt_bias, count, False)
        return q, k, v, -mixer.A_log.exp()[:, None] * F.softplus(raw), beta, low_rank(x, mixer.g_proj).sigmoid()
    gate = F.silu(x @ mixer.g_proj.weight.T)
    if kind == "L":
        return q, k, v, heads(F.logsigmoid(low_rank(x, mixer.gk_proj)) / 16, count, False), None, gate
    cos, sin = rotary_tables(mixer.spec.shape.rotary, torch.arange(x.shape[1]))
    q, k = (apply_rotary(part, cos[:, None], sin[:, None]) for part in (q, k))
    g = torch.log(1 - 2.0 ** (-5 - torch.arange(count))).expand(*x.shape[:2], -1)
    return q, k, v, g, None, gate


@pytest.mark.parametrize("kind", list("DKLT"))
@torch.no_grad()
def test_each_kind_is_the_formula_of_its_paper(kind):
    mixer = build(kind)
    x = inputs(mixer.spec, 2, 40)
    *tensors, gate = written_out(mixer, x)
    o, _ = naive_gated_delta(*tensors)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
    assert relative_rmse(whole(mixer, x), normed.flatten(2) * gate @ mixer.o_proj.weight.T) < CACHE_FP32


@torch.no_grad()
def test_decays_per_channel_start_spread_over_the_heads():
    attention = build("A")
    for kind in "KL":
        spec = mixer_spec(kind, PLAIN)
        mixer = spec.block_class().init_from_attention(spec, attention)
        decay, _ = mixer.gates(mixer.parts(mixer.packed(torch.zeros(1, 1, 48))), chunk(0, 1))
        half_lives = -torch.log(torch.tensor(2.0)) / decay[0, 0]
        expected = torch.logspace(0, 8, 6, base=2.0)[:, None].expand(6, 8)
        torch.testing.assert_close(half_lives, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["T", "L", "D"])
def test_fixed_decays_stay_fp32(kind):
    mixer = mixer_spec(kind, PLAIN).build().to(torch.bfloat16)
    assert {buffer.dtype for buffer in mixer.buffers()} == {torch.float32}
    assert not any(name in mixer.state_dict() for name in ("A_log", "dt_bias"))


def test_retention_needs_an_even_key_dim():
    with pytest.raises(UserError, match=r"T: .*even key_dim"):
        mixer_spec("T@2x5x8", PLAIN)
