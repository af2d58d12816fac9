"""Fast forms of the gated delta rule against the token-by-token truth: outputs, states and every gradient."""

import math

import pytest
import torch
from nasbench_kernels.gated_delta import chunked_gated_delta, gated_delta_step, naive_gated_delta
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse
from torch.nn import functional as F

NAMES = ("q", "k", "v", "g", "beta", "state")


FORMS = {"G": (False, True), "T": (False, False), "K": (True, True), "L": (True, False)}
"""Whether there is a decay for each key channel, and the delta rule, by a kind that has this recurrence."""


def make(tokens, batch=2, heads=3, key_dim=16, value_dim=24, decay=1.0, seed=0, form="G"):
    torch.manual_seed(seed)
    q, k = (F.normalize(torch.randn(batch, tokens, heads, key_dim), dim=-1) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim)
    channels, delta = FORMS[form]
    g = -decay * torch.rand(batch, tokens, heads, *([key_dim] if channels else []))
    beta = torch.rand(batch, tokens, heads) if delta else None
    return [q, k, v, g, beta, torch.randn(batch, heads, key_dim, value_dim)]


def leaves_of(case):
    return [tensor if tensor is None else tensor.requires_grad_() for tensor in case]


def assert_chunks_are_right(tokens, chunk, with_state, form, decay=1.0):
    results = []
    for fast in (naive_gated_delta, lambda *args: chunked_gated_delta(*args, chunk=chunk)):
        leaves = leaves_of(make(tokens, form=form, decay=decay)[: 6 if with_state else 5])
        output, state = fast(*leaves)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        ((output * weight).sum() + state.square().sum()).backward()
        results.append((output, state, [leaf if leaf is None else leaf.grad for leaf in leaves]))
    (output, state, gradients), (fast_output, fast_state, fast_gradients) = results
    assert relative_rmse(fast_output, output) < CHUNKED_FP32
    assert relative_rmse(fast_state, state) < CHUNKED_FP32
    for name, gradient, fast in zip(NAMES, gradients, fast_gradients, strict=False):
        assert gradient is fast is None or relative_rmse(fast, gradient) < GRADIENT_FP32, name


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("chunk", [None, 16, 64])
@pytest.mark.parametrize("with_state", [True, False])
def test_chunked_forward_and_gradients(tokens, chunk, with_state):
    assert_chunks_are_right(tokens, chunk, with_state, "G")


@pytest.mark.parametrize(("tokens", "chunk"), [(1, None), (40, 40), (65, None), (130, 64)])
@pytest.mark.parametrize("form", ["T", "K", "L"])
def test_every_recurrence_in_chunks(tokens, chunk, form):
    assert_chunks_are_right(tokens, chunk, True, form)


@pytest.mark.parametrize("decay", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("form", FORMS)
def test_strong_decays_stay_finite(decay, form):
    leaves = leaves_of(make(150, decay=decay, form=form))
    output, state = chunked_gated_delta(*leaves)
    (output.sum() + state.sum()).backward()
    expected, expected_state = naive_gated_delta(*leaves)
    assert relative_rmse(output, expected) < CHUNKED_FP32
    assert relative_rmse(state, expected_state) < CHUNKED_FP32
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf is not None)


def test_one_key_over_and_over_stays_stable():
    """Every token writes to the same key at full strength: the hardest triangular system that can occur."""
    q, k, v, g, beta, state = make(130)
    k = k[:, :1].expand_as(k)
    case = (q, k, v, torch.zeros_like(g), torch.ones_like(beta), state)
    for fast, expected in zip(chunked_gated_delta(*case), naive_gated_delta(*case), strict=True):
        assert relative_rmse(fast, expected) < CHUNKED_FP32


def test_bf16_inputs_compute_in_fp32():
    case = [tensor.bfloat16() for tensor in make(70)]
    output, state = chunked_gated_delta(*case)
    expected, expected_state = naive_gated_delta(*(tensor.float() for tensor in case))
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_rmse(output, expected) < BF16
    assert relative_rmse(state, expected_state) < CHUNKED_FP32


def test_inputs_are_not_written():
    case = make(40)
    before = [tensor.clone() for tensor in case]
    chunked_gated_delta(*case)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(case, before, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_continuing_from_a_state_is_going_on(form):
    *case, state = make(100, form=form)
    expected, expected_state = chunked_gated_delta(*case, state)
    parts = []
    for span in (slice(0, 37), slice(37, 38), slice(38, 100)):
        part, state = chunked_gated_delta(*(x if x is None else x[:, span] for x in case), state)
        parts.append(part)
    assert relative_rmse(torch.cat(parts, 1), expected) < CHUNKED_FP32
    assert relative_rmse(state, expected_state) < CHUNKED_FP32


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_steps_write_the_state_in_place(scale, form):
    *case, state = make(9, form=form)
    expected, expected_state = naive_gated_delta(*case, state, scale)
    pointer = state.data_ptr()
    outputs = [gated_delta_step(*(x if x is None else x[:, t] for x in case), state, scale) for t in range(9)]
    assert state.data_ptr() == pointer
    assert relative_rmse(torch.stack(outputs, 1), expected) < CHUNKED_FP32
    assert relative_rmse(state, expected_state) < CHUNKED_FP32


@pytest.mark.parametrize(("half_life", "output", "state"), [(8, 0.005, 0.004), (512, 0.018, 0.012)])
def test_rounding_of_a_bf16_state_stays_bounded(half_life, output, state):
    """Against a state in fp32, everything else being fp32: README.md has the table of longer runs."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.zeros(1, 4, 32, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    decay, errors, sizes = torch.full((1, 4), -math.log(2) / half_life), [], []
    for _ in range(256):
        q, k, v = (torch.randn(1, 4, size, generator=generator) for size in (32, 32, 64))
        q, k, beta = F.normalize(q, dim=-1), F.normalize(k, dim=-1), torch.rand(1, 4, generator=generator)
        wide, narrow = (gated_delta_step(q, k, v, decay, beta, one) for one in states)
        errors.append((narrow - wide).square().sum())
        sizes.append(wide.square().sum())
    assert (sum(errors[-25:]) / sum(sizes[-25:])) ** 0.5 < output
    assert relative_rmse(states[1].float(), states[0]) < state
