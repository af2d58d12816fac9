"""Kernels of distillation steps against their naive forms, under the interpreter where there is no GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from nasbench_kernels.gated_delta.naive import RowLayout, naive_recurrence_inputs
from nasbench_kernels.loss.naive import naive_divergence
from nasbench_kernels.norm.naive import naive_gated_norm
from nasbench_kernels.rotary.naive import naive_rotary
from nasbench_kernels.swiglu.naive import naive_swiglu
from tolerances import BF16, GRADIENT_FP32, relative_rmse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def random(*size, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(sum(size))
    return (scale * torch.randn(size, generator=generator)).to(DEVICE, dtype)


def gradients(outputs, leaves):
    """Of a sum of the outputs under random weights."""
    total = sum((output.float() * random(*output.shape)).sum() for output in outputs)
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (3, 4096), (2, 4097), (5, 9001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence(rows, vocabulary, dtype):
    from nasbench_kernels.ops import divergence_rows

    student = random(rows, vocabulary, dtype=dtype, scale=4.0)
    teacher = (student.float() + random(rows, vocabulary + 1)[:, 1:]).to(dtype)
    expected = naive_divergence(student, teacher)
    kl, lse = divergence_rows(student, teacher)
    assert relative_rmse(kl, expected[0]) < 1e-5
    assert relative_rmse(lse, expected[1]) < 1e-5
    again, _ = divergence_rows(student, teacher, gradient=True)
    assert torch.equal(again, kl)
    assert relative_rmse(student, expected[2]) < (1e-5 if dtype == torch.float32 else BF16)


def test_divergence_of_far_logits():
    """Differences of hundreds: nothing overflows, and what is equal has no divergence."""
    from nasbench_kernels.ops import divergence_rows

    student = random(2, 300, scale=200.0)
    kl, _ = divergence_rows(student.clone(), student)
    assert float(kl.abs().max()) < 1e-4
    kl, _ = divergence_rows(student.clone(), -student)
    assert relative_rmse(kl, naive_divergence(student, -student)[0]) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "heads", "key_dim", "sizes", "padding"), [(1, 1, 16, (4,), 0), (45, 3, 24, (8, 5), 3)]
)
def test_training_inputs(tokens, heads, key_dim, sizes, padding):
    from nasbench_kernels.ops import training_inputs

    at = 2 * heads * key_dim + sum(sizes)
    row = random(2, tokens, at + 2 * heads + padding).requires_grad_()
    a_log, dt_bias = (random(heads, 1)[:, 0].clone().requires_grad_() for _ in range(2))
    fast = training_inputs(row, a_log, dt_bias, heads, key_dim, sizes)
    flat = row.flatten(0, 1)
    slow = [x.unflatten(0, (2, tokens)) for x in naive_recurrence_inputs(flat, a_log, dt_bias, heads, key_dim, at)]
    slow += list(row[..., at - sum(sizes) : at].split(sizes, -1))
    for name, ours, theirs in zip(("q", "k", "g", "beta", "first", "second"), fast, slow, strict=False):
        assert relative_rmse(ours, theirs) < 1e-5, name
    leaves = (row, a_log, dt_bias)
    for name, ours, theirs in zip(
        ("row", "a_log", "dt_bias"), gradients(fast, leaves), gradients(slow, leaves), strict=True
    ):
        assert relative_rmse(ours, theirs) < GRADIENT_FP32, name


@pytest.mark.parametrize("mixed", [False, True])
def test_inputs_of_any_layout(mixed):
    """Queries, keys, decays and betas anywhere in the rows; with `mixed`, activated queries and keys from elsewhere."""
    from nasbench_kernels.ops import recurrence_inputs

    heads, dim = 3, 24
    keys, row = heads * dim, random(2, 45, 2 * heads * dim + 20)
    a_log, dt_bias = (random(heads, 1)[:, 0].clone() for _ in range(2))
    layout = RowLayout(keys + 7, 2, 0, 0, 2 * keys + 13, 2 * keys + 9)
    parts = [
        row[..., at : at + size] for at, size in ((keys + 7, keys), (2, keys), (layout.decay, 3), (layout.beta, 3))
    ]
    flat = torch.cat(parts, -1).flatten(0, 1)
    wanted = [x.unflatten(0, (2, 45)) for x in naive_recurrence_inputs(flat, a_log, dt_bias, heads, dim, 2 * keys)]
    active = torch.nn.functional.silu(torch.cat(parts[:2], -1)) if mixed else None
    for name, ours, theirs in zip(
        ("q", "k", "g", "beta"), recurrence_inputs(row, layout, dim, a_log, dt_bias, active), wanted, strict=True
    ):
        assert relative_rmse(ours, theirs) < 1e-5, name


@pytest.mark.parametrize(("tokens", "heads", "value_dim"), [(1, 1, 16), (37, 3, 40)])
def test_gated_norm(tokens, heads, value_dim):
    from nasbench_kernels.ops import gated_norm

    x = random(2, tokens, heads, value_dim).requires_grad_()
    row, weight = random(2, tokens, heads * value_dim + 6).requires_grad_(), random(value_dim).requires_grad_()
    gate = row[..., 3:-3]
    fast = gated_norm(x, gate, weight)
    slow = naive_gated_norm(x.flatten(0, 1), gate.flatten(0, 1), weight).unflatten(0, (2, tokens))
    assert relative_rmse(fast, slow) < 1e-5
    leaves = (x, row, weight)
    for name, ours, theirs in zip(
        ("x", "gate", "weight"), gradients([fast], leaves), gradients([slow], leaves), strict=True
    ):
        assert relative_rmse(ours, theirs) < GRADIENT_FP32, name


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim"), [(1, 1, 1, 2), (35, 3, 1, 24)])
def test_rotary(tokens, heads, kv_heads, dim):
    from nasbench_kernels.ops import rotary

    row = random(2, tokens, (heads + 2 * kv_heads) * dim + 2).requires_grad_()
    angles = random(tokens, dim // 2)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    fast = rotary(row, cos, sin, heads, kv_heads)
    turned = naive_rotary(row, cos, sin, heads + kv_heads)
    v = row[..., (heads + kv_heads) * dim : -2].unflatten(-1, (kv_heads, dim))
    slow = (*turned.split((heads, kv_heads), 2), v)
    for name, ours, theirs in zip("qkv", fast, slow, strict=True):
        assert relative_rmse(ours, theirs) < 1e-5, name
    assert relative_rmse(gradients(fast, [row])[0], gradients(slow, [row])[0]) < GRADIENT_FP32


@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 2 * 700), (2, 2 * 2048)])
def test_swiglu(shape):
    from nasbench_kernels.ops import swiglu

    row = random(*shape).requires_grad_()
    fast, slow = swiglu(row), naive_swiglu(row)
    assert relative_rmse(fast, slow) < 1e-5
    assert relative_rmse(gradients([fast], [row])[0], gradients([slow], [row])[0]) < GRADIENT_FP32
