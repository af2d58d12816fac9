"""The shipped kinds by Triton kernels, on CUDA devices: decode steps, prefill and training.

A kind's `fused_mix` stands between its stacked input projections and its output projection; the engine puts it together
with norms and residual additions, a mixer's own `step` without.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from nasbench_kernels.ops import StepWorkspace

    from nasbench.model.block import MixerCache, Step


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether kernels without a backward can run on x: a CUDA tensor, triton installed, no gradient asked for."""
    return differentiable(x) and not torch.is_grad_enabled()


def differentiable(x: Tensor) -> bool:
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


def mix(mixer: Any, x: Tensor, step: Step, cache: MixerCache) -> Tensor:
    """A decode step of a mixer with a `fused_mix`, up to its output projection: x [B, C] -> [B, D].

    A mixer's `silu_columns` are (begin, size) of the columns of its stacked rows of which it needs SiLU: where a kernel
    can write that beside the row, `fused_mix` gets it.
    """
    weight, bias = mixer.stacked.matrices()
    columns = getattr(mixer, "silu_columns", None)
    if columns is not None and x.shape[0] > 1 and ops().prefer_skinny_gemm(x, weight):
        row, active = ops().gemm_and_silu(x, weight, bias, *columns)
        return mixer.fused_mix(row, step, cache, active)
    return mixer.fused_mix(linear(x, weight, bias), step, cache)


def left_over(x: Tensor, weight: Tensor) -> Tensor:
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
    return ops().argmax(logits) if usable(logits) else logits.argmax(-1)
