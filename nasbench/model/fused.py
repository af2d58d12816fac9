"""The Triton kernels that streams and blocks use on CUDA devices, and when they may."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from nasbench_kernels.gated_delta.decode import StepWorkspace


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def autograd_kernels(x: Tensor) -> bool:
    """Whether kernels that have a backward can run on x: a CUDA tensor, triton installed."""
    return x.is_cuda and _triton()


@cache
def ops() -> Any:
    """The module `nasbench_kernels.ops`, imported when it is first needed: triton takes a second."""
    import nasbench_kernels.ops as module

    return module


@cache
def workspace(device: torch.device) -> StepWorkspace:
    """Scratch of the recurrent step on a device, shared by all layers."""
    return ops().StepWorkspace()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, C] -> [B, N]: a matrix-vector kernel for one row, for more whichever of our kernel and cuBLAS is faster."""
    if x.shape[0] == 1:
        return ops().gemv(x, weight, bias)
    return ops().gemm(x, weight, bias) if ops().prefer_skinny_gemm(x, weight) else F.linear(x, weight, bias)


def partial_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, C], B above 1 -> what `add_norm` adds to the residual: [B, N], or parts of it in fp32, [S, B, N]."""
    if ops().prefer_skinny_gemm(x, weight, split_k=True):
        return ops().gemm(x, weight, split_k=True)
    return F.linear(x, weight)


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, C], weight [2 F, C], gate over up -> SiLU(gate) * up, [B, F]: one kernel for up to 128 sequences."""
    if ops().skinny_gemm_supported(x):
        return ops().swiglu_gemm(x, weight)
    return ops().swiglu(F.linear(x, weight))


def most_likely(logits: Tensor) -> Tensor:
    """Greedy tokens [B] int64 of logits [B, V], the first of equals."""
    fast = autograd_kernels(logits) and not torch.is_grad_enabled()
    return ops().argmax(logits) if fast else logits.argmax(-1)
