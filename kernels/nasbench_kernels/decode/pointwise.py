"""The small steps between matrix products, one launch each: residual addition with RMSNorm, SwiGLU, convolution."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.decode.overlap import dependent, follow


@triton.jit
def add_norm_kernel(
    x, delta, weight, out, part_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIZE
    lanes = tl.arange(0, BLOCK)
    inside = lanes < SIZE
    scale = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    follow(PDL)
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
        delta: as x, or what a product left divided, fp32 [S, ..., C], of which the sum is added (product.py).
    """
    size = x.shape[-1]
    parts = 0 if delta is None else 1 if delta.dim() == x.dim() else delta.shape[0]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    add_norm_kernel[(x.numel() // size,)](
        x, x if delta is None else delta, weight, out, x.numel(),
        SIZE=size, BLOCK=block, PARTS=parts, EPS=eps, num_warps=min(16, max(1, block // 512)), **dependent(x.device),
    )  # fmt: skip
    return out


@triton.jit
def swiglu_kernel(row, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    at = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < SIZE
    gate = tl.load(row + at * 2 * SIZE + lanes, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + at * 2 * SIZE + SIZE + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at * SIZE + lanes, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def swiglu(row: Tensor) -> Tensor:
    """SiLU(gate) * up of rows that hold gate and up side by side: [..., 2 F] contiguous -> [..., F]."""
    size = row.shape[-1] // 2
    out = torch.empty(*row.shape[:-1], size, device=row.device, dtype=row.dtype)
    block = 1024
    swiglu_kernel[(row.numel() // (2 * size), triton.cdiv(size, block))](
        row, out, SIZE=size, BLOCK=block, num_warps=4, **dependent(row.device)
    )
    return out


@triton.jit
def silu_kernel(row, out, row_stride, at, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    index = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < SIZE
    value = tl.load(row + index * row_stride + at + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index * SIZE + lanes, (value / (1.0 + tl.exp(-value))).to(out.dtype.element_ty), mask=inside)


def silu_part(row: Tensor, at: int, size: int) -> Tensor:
    """SiLU of columns at..at+size of rows [B, P] -> [B, size]."""
    out = torch.empty(row.shape[0], size, device=row.device, dtype=row.dtype)
    block = triton.next_power_of_2(size)
    silu_kernel[(row.shape[0],)](
        row, out, row.stride(0), at, SIZE=size, BLOCK=block, num_warps=min(8, max(1, block // 256)),
        **dependent(row.device),
    )  # fmt: skip
    return out


@triton.jit
def conv_step_kernel(
    row, weight, history, row_stride,
    SIZE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < SIZE
    tap = tl.arange(0, BLOCK_T)[:, None]
    both = inside[None, :] & (tap < TAPS)
    taps = tl.load(weight + channel[None, :] * TAPS + tap, mask=both, other=0.0).to(tl.float32)
    follow(PDL)
    at = row + sequence * row_stride + channel
    past = history + (sequence * (TAPS - 1) + tap) * SIZE + channel[None, :]
    newest = tl.load(at, mask=inside, other=0.0)
    earlier = tl.load(past, mask=inside[None, :] & (tap < TAPS - 1), other=0.0)
    inputs = tl.where(tap == TAPS - 1, newest.to(earlier.dtype)[None, :], earlier)
    mixed = tl.sum(inputs.to(tl.float32) * taps, 0)
    # Several threads may hold one element: all must have read before any writes.
    tl.debug_barrier()
    tl.store(past - SIZE, inputs, mask=both & (tap > 0))
    tl.store(at, (mixed / (1.0 + tl.exp(-mixed))).to(row.dtype.element_ty), mask=inside)


def conv_step(row: Tensor, weight: Tensor, history: Tensor) -> None:
    """Static causal convolution and SiLU of the first C columns of rows [B, P], in place; weight [C, W], history
    [B, W-1, C], shifted in place."""
    size, taps = weight.shape
    block = 256
    conv_step_kernel[(row.shape[0], triton.cdiv(size, block))](
        row, weight, history, row.stride(0),
        SIZE=size, TAPS=taps, BLOCK_T=triton.next_power_of_2(taps), BLOCK=block, num_warps=2, **dependent(row.device),
    )  # fmt: skip
