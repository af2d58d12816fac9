"""Fast forms of the recurrence of RWKV7 against the token-by-token truth: outputs, states and every gradient."""

import pytest
import torch
from nasbench_kernels.rwkv7 import chunked_rwkv7, naive_rwkv7, rwkv7_step
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse
from torch.nn import functional as F

import nasbench.model  # noqa: F401  (makes nasbench_kernels importable from a bare checkout)

NAMES = ("r", "decay", "k", "v", "a", "b", "state")


def make(tokens, batch=2, heads=3, dim=12, decay=0.606, seed=0):
    torch.manual_seed(seed)
    r, k, v = (torch.randn(batch, tokens, heads, dim) for _ in range(3))
    kappa = F.normalize(torch.randn_like(k), dim=-1)
    rate = torch.rand_like(k)
    state = torch.randn(batch, heads, dim, dim)
    return [r, -decay * torch.rand_like(r), k, v, -kappa, kappa * rate, state]


@pytest.mark.parametrize("tokens", [1, 2, 63, 65, 130])
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("given", [6, 7])
def test_chunked_forward_and_gradients(tokens, chunk, given):
    results = []
    for form in (naive_rwkv7, lambda *args: chunked_rwkv7(*args, chunk=chunk)):
        leaves = [tensor.requires_grad_() for tensor in make(tokens)][:given]
        y, state = form(*leaves)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        ((y * weight).sum() + state.square().sum()).backward()
        results.append((y, state, [leaf.grad for leaf in leaves]))
    (y, state, gradients), (fast_y, fast_state, fast_gradients) = results
    assert relative_rmse(fast_y, y) < CHUNKED_FP32
    assert relative_rmse(fast_state, state) < CHUNKED_FP32
    for name, gradient, fast in zip(NAMES, gradients, fast_gradients, strict=False):
        # One token without a state has nothing to forget or to remove.
        assert relative_rmse(fast, gradient) < GRADIENT_FP32 or not gradient.any(), name


@torch.no_grad()
def test_the_strongest_decay_loses_no_precision():
    inputs = make(150)
    inputs[1].fill_(-0.6065)
    assert relative_rmse(chunked_rwkv7(*inputs, chunk=64)[0], naive_rwkv7(*inputs)[0]) < CHUNKED_FP32


@torch.no_grad()
def test_documents_are_apart():
    *inputs, state = make(70)
    first = torch.zeros(2, 70, dtype=torch.bool)
    begins = ((0, 9, 10, 41), (5, 64))
    for row, starts in enumerate(begins):
        first[row, list(starts)] = True
    y, last = chunked_rwkv7(*inputs, state, first, chunk=16)
    for row, starts in enumerate(begins):
        held = state[row : row + 1]
        for begin, end in zip((0, *starts), (*starts, 70), strict=True):
            if end > begin:
                part = [tensor[row : row + 1, begin:end] for tensor in inputs]
                wanted, held = naive_rwkv7(*part, None if begin in starts else held)
                assert relative_rmse(y[row : row + 1, begin:end], wanted) < CHUNKED_FP32
        assert relative_rmse(last[row : row + 1], held) < CHUNKED_FP32


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, BF16)])
@torch.no_grad()
def test_steps(dtype, bound):
    *inputs, state = make(5)
    wanted, last = naive_rwkv7(*inputs, state)
    held = state.to(dtype)
    for t in range(5):
        assert relative_rmse(rwkv7_step(*(part[:, t] for part in inputs), held), wanted[:, t]) < bound
    assert relative_rmse(held, last) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 500])
def test_equals_flash_linear_attention(tokens):
    """In bf16: outputs, the last state and every gradient."""
    fla = pytest.importorskip("fla.ops.rwkv7")
    inputs = [tensor.cuda() for tensor in make(tokens, heads=4, dim=64)]
    *inputs, state = [tensor.bfloat16() if i != 1 and i != 6 else tensor for i, tensor in enumerate(inputs)]
    results = []
    for form in (naive_rwkv7, chunked_rwkv7, fla.chunk_rwkv7):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, state)]
        extra = {"initial_state": leaves[6], "output_final_state": True, "safe_gate": True}
        y, last = form(*leaves[:6], **extra) if form is fla.chunk_rwkv7 else form(*leaves)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).cuda()
        ((y.float() * weight).sum() + last.square().sum()).backward()
        results.append({"y": y, "last": last} | {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)})
    for name, wanted in results[0].items():
        for form, bound in ((1, 5e-3), (2, 1e-2)):
            assert relative_rmse(results[form][name].float(), wanted.float()) < bound, (form, name)
