"""The short convolution, static and per token: plain and single-step forms against the token-by-token truth."""

import pytest
import torch
from nasbench_kernels.conv import naive_short_conv, short_conv, short_conv_step
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

CHANNELS = 10
KINDS = ("static", "dynamic")


def make(kind, tokens, taps):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, CHANNELS)
    weight = torch.randn(CHANNELS, taps) if kind == "static" else torch.randn(2, tokens, CHANNELS, taps)
    return x, weight, torch.randn(2, taps - 1, CHANNELS)


def at(kind, weight, span):
    """The weights of some tokens: a static kernel is the same for all."""
    return weight if kind == "static" else weight[:, span]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_forward_and_gradients(kind, taps, tokens):
    x, weight, _ = make(kind, tokens, taps)
    results = []
    for form in (naive_short_conv, short_conv):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        output = form(*leaves)
        output.square().sum().backward()
        results.append((output, *(leaf.grad for leaf in leaves)))
    for name, expected, got in zip(("output", "x", "weight"), *results, strict=True):
        assert relative_rmse(got, expected) < (CHUNKED_FP32 if name == "output" else GRADIENT_FP32), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [2, 4])
def test_the_state_goes_on_in_chunks_and_steps(kind, taps):
    x, weight, conv_state = make(kind, 12, taps)
    expected, outputs = naive_short_conv(x, weight, conv_state), []
    pointer = conv_state.data_ptr()
    for span in (slice(0, 1), slice(1, 3), slice(3, 9)):
        outputs.append(short_conv(x[:, span], at(kind, weight, span), conv_state))
    for t in range(9, 12):
        span = slice(t, t + 1)
        outputs.append(short_conv_step(x[:, span], at(kind, weight, span), conv_state))
    assert relative_rmse(torch.cat(outputs, 1), expected) < CHUNKED_FP32
    assert conv_state.data_ptr() == pointer
    assert torch.equal(conv_state, x[:, 12 - taps + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind):
    x, weight, _ = make(kind, 17, 4)
    got = short_conv(x.bfloat16(), weight.bfloat16())
    assert got.dtype == torch.bfloat16
    assert relative_rmse(got, naive_short_conv(x, weight)) < BF16


@pytest.mark.parametrize("kind", KINDS)
def test_taps_that_other_documents_hold_do_not_count(kind):
    x, weight, _ = make(kind, 9, 4)
    reach = torch.rand(2, 9, 4) < 0.7
    assert relative_rmse(short_conv(x, weight, None, reach), naive_short_conv(x, weight, None, reach)) < CHUNKED_FP32
