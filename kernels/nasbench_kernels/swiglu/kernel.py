"""SwiGLU with its gradient, and SiLU of some columns. Both are bound by memory: everything is read and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.pdl import pdl_launch, wait
from nasbench_kernels.common.tile import silu

FORWARD_BLOCK, BACKWARD_BLOCK = 1024, 2048


@triton.jit
def swiglu_kernel(row, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    at = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < SIZE
    gate = tl.load(row + at * 2 * SIZE + lanes, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + at * 2 * SIZE + SIZE + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at * SIZE + lanes, (silu(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(row, dout, drow, COUNT, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COUNT
    place = at + (at // SIZE) * SIZE
    gate = tl.load(row + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + place + SIZE, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    opening = tl.sigmoid(gate)
    dgate = change * up * opening * (1.0 + gate * (1.0 - opening))
    tl.store(drow + place, dgate.to(drow.dtype.element_ty), mask=inside)
    tl.store(drow + place + SIZE, (change * gate * opening).to(drow.dtype.element_ty), mask=inside)


def _forward(row: Tensor) -> Tensor:
    size = row.shape[-1] // 2
    out = torch.empty(*row.shape[:-1], size, device=row.device, dtype=row.dtype)
    swiglu_kernel[(row.numel() // (2 * size), triton.cdiv(size, FORWARD_BLOCK))](
        row, out, SIZE=size, BLOCK=FORWARD_BLOCK, num_warps=4, **pdl_launch(row.device)
    )
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return _forward(row)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor]:
        (row,) = ctx.saved_tensors
        dout, drow = gradients[0].contiguous(), torch.empty_like(row)
        swiglu_backward_kernel[(triton.cdiv(dout.numel(), BACKWARD_BLOCK),)](
            row, dout, drow, dout.numel(), SIZE=dout.shape[-1], BLOCK=BACKWARD_BLOCK, num_warps=4
        )
        return (drow,)


def swiglu(row: Tensor) -> Tensor:
    """SiLU(gate) * up of rows that hold gate and up side by side: [..., 2 F] -> [..., F], differentiable."""
    row = row.contiguous()
    return _SwiGLU.apply(row) if row.requires_grad and torch.is_grad_enabled() else _forward(row)


@triton.jit
def silu_kernel(row, out, row_stride, at, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    index = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < SIZE
    value = tl.load(row + index * row_stride + at + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index * SIZE + lanes, silu(value).to(out.dtype.element_ty), mask=inside)


def silu_part(row: Tensor, at: int, size: int) -> Tensor:
    """SiLU of columns at..at+size of rows [B, P] -> [B, size]."""
    out = torch.empty(row.shape[0], size, device=row.device, dtype=row.dtype)
    block = triton.next_power_of_2(size)
    silu_kernel[(row.shape[0],)](
        row, out, row.stride(0), at, SIZE=size, BLOCK=block, num_warps=min(8, max(1, block // 256)),
        **pdl_launch(row.device),
    )  # fmt: skip
    return out
