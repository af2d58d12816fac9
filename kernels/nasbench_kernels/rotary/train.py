"""Rotary embedding of training steps, with gradients. It reads the rows of one packed product where they lie."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotary_kernel(
    x, cos, sin, out, T, ROWS, x_stride, out_stride, HEADS, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotates rows of H heads by the angles of their positions; with BACK the other way, as a gradient needs."""
    head = tl.program_id(1)
    index = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_D)
    inside = (index < ROWS)[:, None] & (lanes < HALF)[None, :]
    # Both halves of the tables are the same (nasbench.model.rotary).
    at = (index % T)[:, None] * (2 * HALF) + lanes[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    if BACK:
        s = -s
    source = x + index.to(tl.int64)[:, None] * x_stride + head * (2 * HALF) + lanes[None, :]
    target = out + index.to(tl.int64)[:, None] * out_stride + head * (2 * HALF) + lanes[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, back: bool) -> None:
    """x and out [B, T, >= H * D] with rows of any stride; the first H heads of each are read and written."""
    batch, tokens, _ = x.shape
    half, block = cos.shape[-1] // 2, 32
    rotary_kernel[(triton.cdiv(batch * tokens, block), heads)](
        x, cos, sin, out, tokens, batch * tokens, x.stride(1), out.stride(1), heads,
        HALF=half, BLOCK_D=triton.next_power_of_2(half), BLOCK_R=block, BACK=back, num_warps=4,
    )  # fmt: skip


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = row.shape
        dim = cos.shape[-1]
        ctx.save_for_backward(cos, sin)
        ctx.width, ctx.heads = row.shape[-1], (heads, kv_heads)
        rotated = torch.empty(batch, tokens, (heads + kv_heads) * dim, device=row.device, dtype=row.dtype)
        _rotate(row, cos, sin, rotated, heads + kv_heads, False)
        q, k = rotated.unflatten(-1, (-1, dim)).split((heads, kv_heads), 2)
        v = row[..., (heads + kv_heads) * dim : (heads + 2 * kv_heads) * dim].unflatten(-1, (-1, dim))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk, dv = (g.contiguous().flatten(2) for g in gradients)
        drow = torch.empty(*dq.shape[:2], ctx.width, device=dq.device, dtype=dq.dtype)
        end = dq.shape[-1] + dk.shape[-1]
        _rotate(dq, cos, sin, drow, ctx.heads[0], True)
        _rotate(dk, cos, sin, drow[..., dq.shape[-1] :], ctx.heads[1], True)
        drow[..., end : end + dv.shape[-1]] = dv
        drow[..., end + dv.shape[-1] :] = 0
        return drow, None, None, None, None


def rotary(row: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values side by side in rows [B, T, P] -> q [B, T, H, D] and k [B, T, Hkv, D] rotated by the
    tables [T, D] fp32 of their positions, v [B, T, Hkv, D], a view. Differentiable in the rows."""
    return _Rotary.apply(row, cos.contiguous(), sin.contiguous(), heads, kv_heads)
