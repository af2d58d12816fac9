"""Residual addition and RMSNorm in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.pdl import pdl_launch, wait


@triton.jit
def add_norm_kernel(
    x, delta, weight, out, part_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIZE
    lanes = tl.arange(0, BLOCK)
    inside = lanes < SIZE
    scale = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    wide = tl.load(x + row + lanes, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(delta + row + lanes, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            added += tl.load(delta + part * part_stride + row + lanes, mask=inside, other=0.0)
        wide += added
        # Rounded as the stored sum is, so that the norm is of what later layers see.
        total = wide.to(x.dtype.element_ty)
        tl.store(x + row + lanes, total, mask=inside)
        wide = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide) / SIZE + EPS)
    normed = wide * factor * scale
    tl.store(out + row + lanes, normed.to(out.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place (if given), then RMSNorm(x) * weight: x [..., C] contiguous -> [..., C].

    Args:
        delta: as x, or the partial sums of a split-K product, fp32 [S, ..., C], whose sum is added.
    """
    size = x.shape[-1]
    parts = 0 if delta is None else 1 if delta.dim() == x.dim() else delta.shape[0]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    add_norm_kernel[(x.numel() // size,)](
        x, x if delta is None else delta, weight, out, x.numel(),
        SIZE=size, BLOCK=block, PARTS=parts, EPS=eps, num_warps=min(16, max(1, block // 512)), **pdl_launch(x.device),
    )  # fmt: skip
    return out
