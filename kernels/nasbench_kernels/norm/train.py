"""The gated RMSNorm of prompts and training steps, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.norm.naive import NORM_EPS

FORWARD_ROWS, BACKWARD_ROWS = 16, 32
"""Tokens of a forward program; heads of tokens of a backward one."""


@triton.jit
def gated_norm_kernel(
    x, gate, weight, out, ROWS, gate_stride,
    HEADS: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    index = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_V)
    inside = (index < ROWS)[:, None] & (lanes < VALUE)[None, :]
    index = index.to(tl.int64)
    at = (index[:, None] * HEADS + head) * VALUE + lanes[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 1) / VALUE + EPS)[:, None]
    wide *= tl.load(weight + lanes, mask=lanes < VALUE, other=0.0).to(tl.float32)[None, :]
    opening = tl.load(gate + index[:, None] * gate_stride + head * VALUE + lanes[None, :], mask=inside, other=0.0)
    opening = opening.to(tl.float32)
    wide *= opening / (1.0 + tl.exp(-opening))
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    x, gate, stride, weight, dout, dx, dgate, dweight, ROWS, HEADS: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Also each program's sum of the weight's gradient, [programs, V]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_V)
    inside = (index < ROWS)[:, None] & (lanes < VALUE)[None, :]
    at = index[:, None] * VALUE + lanes[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + lanes, mask=lanes < VALUE, other=0.0).to(tl.float32)[None, :]
    source = gate + (index // HEADS)[:, None] * stride + (index % HEADS)[:, None] * VALUE + lanes[None, :]
    given = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 1) / VALUE + EPS)[:, None]
    normed = wide * factor
    opening = tl.sigmoid(given)
    open_gate = given * opening
    slope = opening * (1.0 + given * (1.0 - opening))
    tl.store(dgate + at, (change * normed * scale * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0) * VALUE + lanes, tl.sum(change * open_gate * normed, 0), mask=lanes < VALUE)
    dnormed = change * open_gate * scale
    along = tl.sum(dnormed * normed, 1) / VALUE
    tl.store(dx + at, (factor * (dnormed - normed * along[:, None])).to(dx.dtype.element_ty), mask=inside)


def _forward(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    batch, tokens, heads, value_dim = x.shape
    out = torch.empty(batch, tokens, heads * value_dim, device=x.device, dtype=gate.dtype)
    gated_norm_kernel[(triton.cdiv(batch * tokens, FORWARD_ROWS), heads)](
        x, gate, weight, out, batch * tokens, gate.stride(1),
        HEADS=heads, VALUE=value_dim, BLOCK_V=triton.next_power_of_2(value_dim), BLOCK_R=FORWARD_ROWS, EPS=NORM_EPS,
        num_warps=4,
    )  # fmt: skip
    return out


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        return _forward(x, gate, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        heads, value_dim = x.shape[-2:]
        dout, dx = gradients[0].contiguous(), torch.empty_like(x)
        dgate, rows = torch.empty_like(dout), x.numel() // value_dim
        programs = triton.cdiv(rows, BACKWARD_ROWS)
        dweight = torch.empty(programs, value_dim, device=x.device)
        gated_norm_backward_kernel[(programs,)](
            x, gate, gate.stride(1), weight, dout, dx, dgate, dweight, rows, HEADS=heads, VALUE=value_dim,
            BLOCK_V=triton.next_power_of_2(value_dim), BLOCK_R=BACKWARD_ROWS, EPS=NORM_EPS, num_warps=4,
        )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over each head of x [B, T, H, V] with one weight [V], times SiLU of gate [B, T, H * V] -> [B, T, H * V],
    differentiable in all. The gate may be columns of longer rows."""
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, gate, weight))
    return (_GatedNorm.apply if learns else _forward)(x.contiguous(), gate, weight)
