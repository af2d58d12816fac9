"""The two short convolutions: vectorised and single-step forms against the token-by-token truth."""

import pytest
import torch
from nasbench_kernels.causal_conv import causal_conv, causal_conv_step, naive_causal_conv
from nasbench_kernels.dynamic_conv import dynamic_conv, dynamic_conv_step, naive_dynamic_conv
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

CHANNELS = 10
FORMS = {
    "static": (naive_causal_conv, causal_conv, causal_conv_step),
    "dynamic": (naive_dynamic_conv, dynamic_conv, dynamic_conv_step),
}


def make(kind, tokens, taps):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, CHANNELS)
    weight = torch.randn(CHANNELS, taps) if kind == "static" else torch.randn(2, tokens, CHANNELS, taps)
    return x, weight, torch.randn(2, taps - 1, CHANNELS)


def at(kind, weight, span):
    """The weights of some tokens: a static kernel is the same for all."""
    return weight if kind == "static" else weight[:, span]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_forward_and_gradients(kind, taps, tokens):
    naive, fast, _ = FORMS[kind]
    x, weight, _ = make(kind, tokens, taps)
    results = []
    for form in (naive, fast):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        output = form(*leaves)
        output.square().sum().backward()
        results.append((output, *(leaf.grad for leaf in leaves)))
    for name, expected, got in zip(("output", "x", "weight"), *results, strict=True):
        assert relative_rmse(got, expected) < (CHUNKED_FP32 if name == "output" else GRADIENT_FP32), name


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("taps", [2, 4])
def test_history_goes_on_in_chunks_and_steps(kind, taps):
    naive, fast, single = FORMS[kind]
    x, weight, history = make(kind, 12, taps)
    expected, outputs = naive(x, weight, history), []
    pointer = history.data_ptr()
    for span in (slice(0, 1), slice(1, 3), slice(3, 9)):
        outputs.append(fast(x[:, span], at(kind, weight, span), history))
    for t in range(9, 12):
        span = slice(t, t + 1)
        outputs.append(single(x[:, span], at(kind, weight, span), history))
    assert relative_rmse(torch.cat(outputs, 1), expected) < CHUNKED_FP32
    assert history.data_ptr() == pointer
    assert torch.equal(history, x[:, 12 - taps + 1 :])


@pytest.mark.parametrize("kind", FORMS)
def test_bf16(kind):
    naive, fast, _ = FORMS[kind]
    x, weight, _ = make(kind, 17, 4)
    got = fast(x.bfloat16(), weight.bfloat16())
    assert got.dtype == torch.bfloat16
    assert relative_rmse(got, naive(x, weight)) < BF16
