"""The chunked kernels and what stands around them, under the interpreter where there is no GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from nasbench_kernels.gated_delta import naive_gated_delta
from tolerances import CHUNKED_FP32, GRADIENT_FP32, relative_rmse
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
NAMES = ("q", "k", "v", "g", "beta", "state")


def make(tokens, batch=2, heads=2, key_dim=24, value_dim=40, decay=1.0):
    torch.manual_seed(tokens)
    q, k = (F.normalize(torch.randn(batch, tokens, heads, key_dim), dim=-1) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim)
    g = -decay * torch.rand(batch, tokens, heads)
    case = [q, k, v, g, torch.rand(batch, tokens, heads), torch.randn(batch, heads, key_dim, value_dim)]
    return [tensor.to(DEVICE) for tensor in case]


def outcome(form, case):
    leaves = [tensor.clone().requires_grad_() for tensor in case]
    output, state = form(*leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    ((output * weight).sum() + state.square().sum()).backward()
    return output, state, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(("tokens", "key_dim", "value_dim"), [(1, 16, 16), (63, 24, 40), (64, 24, 40), (130, 96, 72)])
@pytest.mark.parametrize("with_state", [True, False])
def test_rule_forward_and_gradients(tokens, key_dim, value_dim, with_state):
    from nasbench_kernels.ops import triton_gated_delta

    case = make(tokens, key_dim=key_dim, value_dim=value_dim)[: 6 if with_state else 5]
    results = zip(outcome(triton_gated_delta, case), outcome(naive_gated_delta, case), strict=True)
    for name, (fast, expected) in zip(("output", "state out", *NAMES), results, strict=False):
        assert relative_rmse(fast, expected) < (GRADIENT_FP32 if name in NAMES else CHUNKED_FP32), name


def test_rule_without_a_gradient_is_the_same():
    from nasbench_kernels.ops import triton_gated_delta

    case = make(130)
    output, state, *_ = outcome(triton_gated_delta, case)
    with torch.no_grad():
        again = triton_gated_delta(*case)
    assert torch.equal(again[0], output)
    assert torch.equal(again[1], state)


@pytest.mark.parametrize("decay", [0.0, 30.0, 1000.0])
def test_strong_decays_stay_finite(decay):
    from nasbench_kernels.ops import triton_gated_delta

    case = make(100, decay=decay)
    fast, expected = outcome(triton_gated_delta, case), outcome(naive_gated_delta, case)
    assert relative_rmse(fast[0], expected[0]) < CHUNKED_FP32
    assert relative_rmse(fast[1], expected[1]) < CHUNKED_FP32
    assert all(torch.isfinite(tensor).all() for tensor in fast)


def test_one_key_over_and_over_stays_stable():
    """Every token writes to the same key at full strength: the hardest triangular system that can occur."""
    from nasbench_kernels.ops import triton_gated_delta

    q, k, v, g, beta, state = make(130)
    case = (q, k[:, :1].expand_as(k), v, torch.zeros_like(g), torch.ones_like(beta), state)
    for fast, expected in zip(triton_gated_delta(*case), naive_gated_delta(*case), strict=True):
        assert relative_rmse(fast, expected) < CHUNKED_FP32


def test_mixed_dtypes_are_refused():
    from nasbench_kernels.ops import triton_gated_delta

    q, k, v, *rest = make(4)
    with pytest.raises(TypeError, match="share a dtype"):
        triton_gated_delta(q.half(), k, v, *rest)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33, 66, 300, 1000])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 8), (16, 4), (64, 64), (96, 256), (128, 128)])
def test_rule_in_bf16_is_as_close_as_the_plain_form(tokens, key_dim, value_dim):
    """Sizes of tiles choose the GPU's instructions, and the interpreter knows none of them."""
    from nasbench_kernels.gated_delta import chunked_gated_delta
    from nasbench_kernels.ops import triton_gated_delta

    case = make(tokens, heads=6, key_dim=key_dim, value_dim=value_dim)
    exact = outcome(naive_gated_delta, case)
    narrow = [tensor.bfloat16() if at < 3 else tensor for at, tensor in enumerate(case)]
    fast, plain = outcome(triton_gated_delta, narrow), outcome(chunked_gated_delta, narrow)
    for name, mine, theirs, expected in zip(("output", "state out", *NAMES), fast, plain, exact, strict=True):
        error, usual = relative_rmse(mine.float(), expected), relative_rmse(theirs.float(), expected)
        assert error < max(1.5 * usual, 1e-2), (name, error, usual)
