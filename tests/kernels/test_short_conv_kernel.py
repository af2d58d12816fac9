"""The short convolution's Triton form against the token-by-token truth: values, gradients, chunks, documents."""

import os
from itertools import pairwise

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")

# ruff: noqa: E402
from nasbench_kernels.conv import naive_short_conv
from nasbench_kernels.ops import triton_short_conv
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

DEVICE = "cuda" if GPU else "cpu"
KINDS = ("static", "dynamic")


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, so that an element that no kernel writes fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(kind, batch, tokens, channels, taps, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, channels)
    shape = (channels, taps) if kind == "static" else (batch, tokens, channels, taps)
    return [tensor.to(DEVICE, dtype) for tensor in (x, torch.randn(shape), torch.randn(batch, taps - 1, channels))]


def at(kind, conv_weight, span):
    return conv_weight if kind == "static" else conv_weight[:, span]


def outputs_and_gradients(form, x, conv_weight):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, conv_weight)]
    output = form(*leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    (output * weight).sum().backward()
    return {"output": output, "x": leaves[0].grad, "conv_weight": leaves[1].grad}


def compare(got, expected, tolerance, gradient_tolerance):
    for name, value in expected.items():
        assert relative_rmse(got[name], value) < (tolerance if name == "output" else gradient_tolerance), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "channels", "taps"), [(1, 5, 4), (3, 70, 4), (67, 140, 4), (19, 33, 1), (35, 7, 3)])
def test_forward_and_gradients(kind, tokens, channels, taps):
    x, conv_weight, _ = make(kind, 2, tokens, channels, taps)
    expected = outputs_and_gradients(naive_short_conv, x, conv_weight)
    compare(outputs_and_gradients(triton_short_conv, x, conv_weight), expected, CHUNKED_FP32, GRADIENT_FP32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    x, conv_weight, _ = make(kind, 2, 18, 10, 4, dtype)
    got = outputs_and_gradients(triton_short_conv, x, conv_weight)
    assert {value.dtype for value in got.values()} == {dtype}
    compare(got, outputs_and_gradients(naive_short_conv, x.float(), conv_weight.float()), BF16, BF16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [2, 4])
def test_the_state_goes_on_in_chunks(kind, taps):
    """Chunks shorter than, as long as and longer than the conv_state, and across blocks of tokens."""
    x, conv_weight, conv_state = make(kind, 2, 40, 10, taps)
    expected, pointer, begin, outputs = naive_short_conv(x, conv_weight, conv_state), conv_state.data_ptr(), 0, []
    for size in (1, 2, 3, 17, 16, 1):
        span = slice(begin, begin + size)
        outputs.append(triton_short_conv(x[:, span], at(kind, conv_weight, span), conv_state))
        begin += size
    assert begin == 40
    assert relative_rmse(torch.cat(outputs, 1), expected) < CHUNKED_FP32
    assert conv_state.data_ptr() == pointer
    assert torch.equal(conv_state, x[:, 40 - taps + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_training(kind):
    """The forward replaces it before the backward needs it."""
    x, conv_weight, conv_state = make(kind, 2, 9, 6, 4)
    expected = outputs_and_gradients(lambda *leaves: naive_short_conv(*leaves, conv_state), x, conv_weight)
    got = outputs_and_gradients(lambda *leaves: triton_short_conv(*leaves, conv_state.clone()), x, conv_weight)
    compare(got, expected, CHUNKED_FP32, GRADIENT_FP32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("borders", [[0, 35], [0, 1, 2, 5, 21, 35], [0, 16, 32, 35]])
def test_packed_documents_do_not_mix(kind, borders):
    x, conv_weight, _ = make(kind, 1, 35, 10, 4)
    ages = torch.cat([torch.arange(end - begin) for begin, end in pairwise(borders)]).to(DEVICE, torch.int32)[None]

    def apart(x, conv_weight):
        spans = [slice(*pair) for pair in pairwise(borders)]
        return torch.cat([naive_short_conv(x[:, span], at(kind, conv_weight, span)) for span in spans], dim=1)

    got = outputs_and_gradients(lambda *leaves: triton_short_conv(*leaves, position_ids=ages), x, conv_weight)
    compare(got, outputs_and_gradients(apart, x, conv_weight), CHUNKED_FP32, GRADIENT_FP32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [3, 4])
def test_inputs_within_wider_rows(kind, taps):
    x, conv_weight, _ = make(kind, 2, 39, 12, taps)
    row = torch.randn(2, 39, 31).to(x)
    row[..., 5:17] = x
    got = outputs_and_gradients(
        lambda row, conv_weight: triton_short_conv(row[..., 5:17], conv_weight), row, conv_weight
    )
    got["x"] = got["x"][..., 5:17]
    compare(got, outputs_and_gradients(naive_short_conv, x, conv_weight), CHUNKED_FP32, GRADIENT_FP32)
    flipped = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert relative_rmse(triton_short_conv(flipped, conv_weight), naive_short_conv(x, conv_weight)) < CHUNKED_FP32


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(kind):
    x, conv_weight, _ = make(kind, 2, 515, 3072, 4, torch.bfloat16)
    expected = outputs_and_gradients(naive_short_conv, x.float(), conv_weight.float())
    compare(outputs_and_gradients(triton_short_conv, x, conv_weight), expected, BF16, BF16)
