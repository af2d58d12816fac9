"""Fast forms of the recurrence of Mamba2 against the token-by-token truth: outputs, states and every gradient."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from nasbench_kernels.conv import naive_short_conv
from nasbench_kernels.mamba2 import chunked_mamba2, mamba2_step, naive_mamba2
from nasbench_kernels.mamba2.decode import StepLaunch, fused_mamba2_step, step_launch
from nasbench_kernels.mamba2.norm import gated_norm_of_groups
from nasbench_kernels.mamba2.prefill import triton_mamba2
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("x", "dt", "decay", "b", "c", "skip", "state")
STEP_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def make(tokens, batch=2, heads=6, dim=12, groups=2, size=20, decay=1.0, seed=0):
    torch.manual_seed(seed)
    x, b, c = (
        torch.randn(batch, tokens, *rest, device=DEVICE) for rest in ((heads, dim), (groups, size), (groups, size))
    )
    dt = torch.rand(batch, tokens, heads, device=DEVICE)
    state = torch.randn(batch, heads, dim, size, device=DEVICE)
    return [x, dt, -decay * torch.rand_like(dt), b / size**0.5, c, torch.randn(heads, device=DEVICE), state]


def poisoned(monkeypatch):
    """Uninitialised memory is NaN, so that an output that nobody writes fails."""
    empty, like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **rest: empty(*args, **rest).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **rest: like(*args, **rest).fill_(float("nan")))


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("given", [5, 7])
def test_chunked_forward_and_gradients(tokens, chunk, given):
    results = []
    for form in (naive_mamba2, lambda *args: chunked_mamba2(*args, chunk=chunk)):
        leaves = [tensor.requires_grad_() for tensor in make(tokens)][:given]
        y, state = form(*leaves)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
        ((y * weight).sum() + state.square().sum()).backward()
        results.append((y, state, [leaf.grad for leaf in leaves]))
    (y, state, gradients), (fast_y, fast_state, fast_gradients) = results
    assert relative_rmse(fast_y, y) < CHUNKED_FP32
    assert relative_rmse(fast_state, state) < CHUNKED_FP32
    for name, gradient, fast in zip(NAMES, gradients, fast_gradients, strict=False):
        # One token without a state has nothing to forget.
        assert relative_rmse(fast, gradient) < GRADIENT_FP32 or not gradient.any(), name


@pytest.mark.parametrize("decay", [0.0, 30.0, 1000.0])
def test_strong_decays_stay_finite(decay):
    leaves = [tensor.requires_grad_() for tensor in make(150, decay=decay)]
    y, state = chunked_mamba2(*leaves)
    (y.sum() + state.sum()).backward()
    expected, expected_state = naive_mamba2(*leaves)
    assert relative_rmse(y, expected) < CHUNKED_FP32
    assert relative_rmse(state, expected_state) < CHUNKED_FP32
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_bf16_inputs_compute_in_fp32():
    case = [tensor.bfloat16() for tensor in make(70)]
    y, state = chunked_mamba2(*case)
    expected, expected_state = naive_mamba2(*(tensor.float() for tensor in case))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_rmse(y, expected) < BF16
    assert relative_rmse(state, expected_state) < CHUNKED_FP32


@pytest.mark.parametrize("form", [chunked_mamba2, triton_mamba2])
def test_continuing_from_a_state_is_going_on_and_inputs_stay(form):
    *case, skip, state = make(100)
    before = [tensor.clone() for tensor in (*case, skip, state)]
    expected, expected_state = naive_mamba2(*case, skip, state)
    parts, now = [], state
    for span in (slice(0, 37), slice(37, 38), slice(38, 100)):
        part, now = form(*(tensor[:, span] for tensor in case), skip, now)
        parts.append(part)
    assert relative_rmse(torch.cat(parts, 1), expected) < CHUNKED_FP32
    assert relative_rmse(now, expected_state) < CHUNKED_FP32
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((*case, skip, state), before, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_steps_write_the_state_in_place(kind):
    *case, skip, state = make(9)
    expected, expected_state = naive_mamba2(*case, skip, state)
    state, close = state.to(kind), CHUNKED_FP32 if kind == torch.float32 else BF16
    pointer = state.data_ptr()
    outputs = [mamba2_step(*(tensor[:, t] for tensor in case), skip, state) for t in range(9)]
    assert state.data_ptr() == pointer
    assert relative_rmse(torch.stack(outputs, 1), expected) < close
    assert relative_rmse(state, expected_state) < close


@pytest.mark.parametrize("tokens", [1, 64, 100])
@pytest.mark.parametrize(
    "sizes", [{}, {"heads": 3, "groups": 1, "dim": 40, "size": 17}, {"heads": 2, "groups": 1, "dim": 64, "size": 128}]
)
@pytest.mark.parametrize("given", [5, 7])
def test_prompt_kernel(tokens, sizes, given, monkeypatch):
    case = make(tokens, **sizes)[:given]
    y, state = naive_mamba2(*case)
    # x, b and c as columns of wider rows, as a mixer has them.
    x, b, c = (F.pad(part.flatten(2), (3, 2)) for part in (case[0], case[3], case[4]))
    case[0], case[3], case[4] = (
        wide[..., 3:-2].unflatten(-1, part.shape[2:]) for wide, part in ((x, case[0]), (b, case[3]), (c, case[4]))
    )
    poisoned(monkeypatch)
    fast, fast_state = triton_mamba2(*case)
    assert relative_rmse(fast, y) < CHUNKED_FP32
    assert relative_rmse(fast_state, state) < CHUNKED_FP32


@pytest.mark.parametrize("tokens", [1, 64, 75])
@pytest.mark.parametrize("sizes", [{}, {"heads": 3, "groups": 1, "dim": 40, "size": 17}])
@pytest.mark.parametrize("given", [5, 7])
def test_gradients_of_the_prompt_kernels(tokens, sizes, given, monkeypatch):
    results = []
    for form in (naive_mamba2, triton_mamba2):
        leaves = [tensor.requires_grad_() for tensor in make(tokens, **sizes)][:given]
        weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
        if form is triton_mamba2:
            poisoned(monkeypatch)
        y, state = form(*leaves)
        ((y * weight).sum() + state.square().sum()).backward()
        results.append([leaf.grad for leaf in leaves])
    for name, gradient, fast in zip(NAMES, *results, strict=False):
        assert relative_rmse(fast, gradient) < GRADIENT_FP32 or not gradient.any(), name


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm(groups, monkeypatch):
    y, row, weight = (
        torch.randn(5, 132, device=DEVICE),
        torch.randn(5, 141, device=DEVICE),
        torch.rand(132, device=DEVICE),
    )
    gated = (y * F.silu(row[:, :132])).unflatten(1, (groups, -1))
    expected = (gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(1) * weight
    monkeypatch.setattr("nasbench_kernels.mamba2.norm.BLOCK", 64)
    out = torch.full_like(y, float("nan"))
    gated_norm_of_groups(y, row, weight, groups, 1e-5, out)
    assert relative_rmse(out, expected) < STEP_CLOSE[torch.float32]


def naive_step(row, weight, bias, conv_state, state, a_log, dt_bias, skip, norm_weight, limit):
    """One step in fp32 from the naive forms, which write nothing -> output, conv state, state."""
    _, heads, dim, size = state.shape
    inner = heads * dim
    z, columns, dt = row.float().split((inner, weight.shape[0], heads), -1)
    mixed = naive_short_conv(columns[:, None], weight.float(), conv_state.float(), bias=bias.float())
    x, b, c = mixed.split((inner, (weight.shape[0] - inner) // 2, (weight.shape[0] - inner) // 2), -1)
    dt = F.softplus(dt + dt_bias).clamp(*limit)[:, None]
    b, c = b.unflatten(-1, (-1, size)), c.unflatten(-1, (-1, size))
    y, state = naive_mamba2(x.unflatten(-1, (heads, dim)), dt, -a_log.exp() * dt, b, c, skip, state.float())
    gated = (y.flatten(2)[:, 0] * F.silu(z)).unflatten(1, (b.shape[2], -1))
    normed = (gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(1) * norm_weight.float()
    return normed, torch.cat((conv_state, columns[:, None].to(conv_state.dtype)), 1)[:, 1:], state


def check_step(sizes, dtype, monkeypatch, kind=torch.float32, launch=None, limit=(0.0, float("inf")), taps=4):
    """Two steps of sizes (B, H, P, G, N): the second finds the states that the first left."""
    batch, heads, dim, groups, size = sizes
    channels = heads * dim + 2 * groups * size
    generator = torch.Generator().manual_seed(sum(sizes))

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    weights = [draw(channels, taps), draw(channels)]
    gates = [draw(heads, dtype=torch.float32) for _ in range(3)]
    norm_weight = draw(heads * dim)
    conv_state, state = draw(batch, taps - 1, channels), draw(batch, heads, dim, size, dtype=kind)
    expected_conv, expected_state = conv_state.clone(), state.float().clone()
    poisoned(monkeypatch)
    close = STEP_CLOSE[dtype] if kind == torch.float32 else 1e-2
    for _ in range(2):
        row = draw(batch, heads * dim + channels + heads)
        got = fused_mamba2_step(
            row, *weights, conv_state, state, *gates, norm_weight, eps=1e-5, dt_limit=limit, launch=launch
        )
        expected, expected_conv, expected_state = naive_step(
            row, *weights, expected_conv, expected_state, *gates, norm_weight, limit
        )
        assert got.dtype == dtype
        assert relative_rmse(got.float(), expected) < close
        assert relative_rmse(state.float(), expected_state) < (1e-5 if kind == torch.float32 else 1e-2)
        assert torch.equal(conv_state, expected_conv)


@pytest.mark.parametrize("sizes", [(2, 3, 24, 1, 40), (1, 4, 64, 2, 16), (3, 1, 96, 1, 100), (1, 2, 5, 1, 3)])
@pytest.mark.parametrize("dtype", list(STEP_CLOSE))
def test_step_kernel(sizes, dtype, monkeypatch):
    check_step(sizes, dtype, monkeypatch)


@pytest.mark.parametrize(
    "launch", [StepLaunch(16, tiles=4, stages=2), StepLaunch(4, tiles=8), StepLaunch(16), StepLaunch(8, warps=1)]
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_step_kernel_in_other_launches(launch, kind, monkeypatch):
    check_step((2, 8, 16, 2, 24), torch.bfloat16, monkeypatch, kind, launch)


@pytest.mark.parametrize("sizes", [(3, 6, 16, 3, 24), (3, 3, 16, 3, 24), (2, 4, 24, 1, 16)])
def test_the_launch_of_many_heads(sizes, monkeypatch):
    _, heads, dim, groups, size = sizes
    launch = step_launch(512, heads, heads // groups, dim, size, 16)
    assert launch.tiles == 4
    check_step(sizes, torch.float32, monkeypatch, launch=launch)


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "size", "block"),
    [(80, 1, 64, 128, 16), (9, 9, 64, 64, 16), (9, 1, 64, 64, 16), (12, 1, 256, 256, 8), (24, 1, 64, 16, 64)],
)
def test_tiles_divide_every_shape(heads, groups, dim, size, block):
    launch = step_launch(256, heads, heads // groups, dim, size, 132)
    assert (launch.block_p, launch.tiles) == (block, 4)
    assert dim % launch.block_p == heads // groups * (dim // launch.block_p) % 4 == 0


def test_step_sizes_are_clamped_and_taps_are_any_number(monkeypatch):
    check_step((2, 2, 8, 1, 16), torch.float32, monkeypatch, limit=(0.3, 0.9), taps=3)


def test_a_launch_that_leaves_something_out_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="does not divide 2 groups of 3 heads of 16"):
        check_step((2, 6, 16, 2, 24), torch.float32, monkeypatch, launch=StepLaunch(16, tiles=2))
