"""What stands around the gated delta rule in training: its inputs from one merged product's rows, its gated output
norm, both with gradients. The forms without are in `../prefill/pointwise.py`.

As PyTorch operations, the activation, the norm and the cast of queries and keys write tensors in fp32, each several
times as large as what comes out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.distill.naive import L2_EPS, NORM_EPS

BLOCK_ROWS = 32
"""Tokens of a program, or heads of tokens."""


@triton.jit
def _unit(x, EPS: tl.constexpr):
    """(SiLU of x [R, K], 1 / its norm [R])."""
    active = x * tl.sigmoid(x)
    return active, tl.rsqrt(tl.sum(active * active, 1) + EPS)


@triton.jit
def rule_forward_kernel(
    row, stride, a_log, dt_bias, q, k, g, beta, ROWS, decay_at, HEADS: tl.constexpr, KEY: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = index < ROWS
    lanes = tl.arange(0, BLOCK_K)
    inside = in_rows[:, None] & (lanes < KEY)[None, :]
    source = row + index[:, None] * stride + head * KEY + lanes[None, :]
    target = (index[:, None] * HEADS + head) * KEY + lanes[None, :]
    query, size = _unit(tl.load(source, mask=inside, other=0.0).to(tl.float32), EPS)
    tl.store(q + target, (query * size[:, None]).to(q.dtype.element_ty), mask=inside)
    key, size = _unit(tl.load(source + HEADS * KEY, mask=inside, other=0.0).to(tl.float32), EPS)
    tl.store(k + target, (key * size[:, None]).to(k.dtype.element_ty), mask=inside)

    gates = row + index * stride + decay_at + head
    step = tl.load(gates, mask=in_rows, other=0.0).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    softplus = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    strength = tl.load(gates + HEADS, mask=in_rows, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(a_log + head).to(tl.float32))
    tl.store(g + index * HEADS + head, -rate * softplus, mask=in_rows)
    tl.store(beta + index * HEADS + head, tl.sigmoid(strength), mask=in_rows)


@triton.jit
def _through_unit(x, dy, EPS: tl.constexpr):
    """Gradient of x [R, K], from that of its SiLU brought to norm 1."""
    active, size = _unit(x, EPS)
    unit = active * size[:, None]
    dactive = size[:, None] * (dy - unit * tl.sum(unit * dy, 1)[:, None])
    opening = tl.sigmoid(x)
    return dactive * opening * (1.0 + x * (1.0 - opening))


@triton.jit
def rule_backward_kernel(
    row, stride, a_log, dt_bias, dq, dk, dg, dbeta, drow, out_stride, da_log, ddt_bias, ROWS, decay_at,
    HEADS: tl.constexpr, KEY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Also sums over each program's tokens of what a_log and dt_bias get, [programs, H]."""
    head = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = index < ROWS
    lanes = tl.arange(0, BLOCK_K)
    inside = in_rows[:, None] & (lanes < KEY)[None, :]
    part = head * KEY + lanes[None, :]
    source = row + index[:, None] * stride + part
    target = drow + index[:, None] * out_stride + part
    given = (index[:, None] * HEADS + head) * KEY + lanes[None, :]
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(dq + given, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, _through_unit(x, change, EPS).to(drow.dtype.element_ty), mask=inside)
    x = tl.load(source + HEADS * KEY, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(dk + given, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + HEADS * KEY, _through_unit(x, change, EPS).to(drow.dtype.element_ty), mask=inside)

    gates = row + index * stride + decay_at + head
    step = tl.load(gates, mask=in_rows, other=0.0).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    softplus = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    rate = tl.exp(tl.load(a_log + head).to(tl.float32))
    decay = tl.load(dg + index * HEADS + head, mask=in_rows, other=0.0).to(tl.float32)
    ddecay = -decay * rate * tl.sigmoid(step)
    strength = tl.sigmoid(tl.load(gates + HEADS, mask=in_rows, other=0.0).to(tl.float32))
    dstrength = tl.load(dbeta + index * HEADS + head, mask=in_rows, other=0.0).to(tl.float32)
    dstrength = dstrength * strength * (1.0 - strength)
    out = drow + index * out_stride + decay_at + head
    tl.store(out, ddecay.to(drow.dtype.element_ty), mask=in_rows)
    tl.store(out + HEADS, dstrength.to(drow.dtype.element_ty), mask=in_rows)
    sums = tl.program_id(0) * HEADS + head
    tl.store(da_log + sums, -rate * tl.sum(decay * softplus, 0))
    tl.store(ddt_bias + sums, tl.sum(ddecay, 0))


class _RuleInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row: Tensor, a_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        row = row.contiguous()
        batch, tokens, width = row.shape
        begin = 2 * heads * key_dim
        decay_at = begin + sum(sizes)
        ctx.save_for_backward(row, a_log, dt_bias)
        ctx.heads, ctx.key_dim, ctx.sizes = heads, key_dim, sizes
        q = torch.empty(batch, tokens, heads, key_dim, device=row.device, dtype=row.dtype)
        k = torch.empty_like(q)
        g = torch.empty(batch, tokens, heads, device=row.device, dtype=torch.float32)
        beta = torch.empty_like(g)
        rule_forward_kernel[(triton.cdiv(batch * tokens, BLOCK_ROWS), heads)](
            row, width, a_log, dt_bias, q, k, g, beta, batch * tokens, decay_at,
            HEADS=heads, KEY=key_dim, BLOCK_K=triton.next_power_of_2(key_dim), BLOCK_R=BLOCK_ROWS, EPS=L2_EPS,
            num_warps=4,
        )  # fmt: skip
        rest = row[..., begin:decay_at].split(sizes, -1)
        return q, k, g, beta, *rest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row, a_log, dt_bias = ctx.saved_tensors
        dq, dk, dg, dbeta = (x.contiguous() for x in gradients[:4])
        batch, tokens, width = row.shape
        begin, end = 2 * ctx.heads * ctx.key_dim, 2 * ctx.heads * ctx.key_dim + sum(ctx.sizes)
        drow = torch.empty_like(row)
        programs = triton.cdiv(batch * tokens, BLOCK_ROWS)
        da_log, ddt_bias = (torch.empty(programs, ctx.heads, device=row.device) for _ in range(2))
        rule_backward_kernel[(programs, ctx.heads)](
            row, width, a_log, dt_bias, dq, dk, dg, dbeta, drow, width, da_log, ddt_bias, batch * tokens, end,
            HEADS=ctx.heads, KEY=ctx.key_dim, BLOCK_K=triton.next_power_of_2(ctx.key_dim), BLOCK_R=BLOCK_ROWS,
            EPS=L2_EPS, num_warps=4,
        )  # fmt: skip
        for part, change in zip(drow[..., begin:end].split(ctx.sizes, -1), gradients[4:], strict=True):
            part.copy_(change)
        drow[..., end + 2 * ctx.heads :] = 0
        return drow, da_log.sum(0).to(a_log.dtype), ddt_bias.sum(0).to(dt_bias.dtype), None, None, None


def rule_inputs(
    row: Tensor, a_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, sizes: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Rows [B, T, P] of queries, keys, further parts of the given sizes, H log decays, H writing strengths, and any
    padding -> q, k [B, T, H, K] after SiLU and of norm 1, g, beta [B, T, H] fp32, and each further part [B, T, size].

    Differentiable in the rows, a_log and dt_bias, [H] each.
    """
    return _RuleInputs.apply(row, a_log, dt_bias, heads, key_dim, sizes)


@triton.jit
def gated_norm_forward_kernel(
    x, gate, stride, weight, out, ROWS, HEADS: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """A row is one head of one token; the gates of a token lie `stride` behind those of the token before."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lanes = tl.arange(0, BLOCK_V)
    inside = (index < ROWS)[:, None] & (lanes < VALUE)[None, :]
    at = index[:, None] * VALUE + lanes[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + lanes, mask=lanes < VALUE, other=0.0).to(tl.float32)[None, :]
    source = gate + (index // HEADS)[:, None] * stride + (index % HEADS)[:, None] * VALUE + lanes[None, :]
    opening = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 1) / VALUE + EPS)[:, None] * scale
    tl.store(out + at, (wide * opening * tl.sigmoid(opening)).to(out.dtype.element_ty), mask=inside)


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


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, gate, weight)
        heads, value_dim = x.shape[-2:]
        out, rows = torch.empty(gate.shape, device=gate.device, dtype=gate.dtype), x.numel() // value_dim
        gated_norm_forward_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
            x, gate, gate.stride(1), weight, out, rows, HEADS=heads, VALUE=value_dim,
            BLOCK_V=triton.next_power_of_2(value_dim), BLOCK_R=BLOCK_ROWS, EPS=NORM_EPS, num_warps=4,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        heads, value_dim = x.shape[-2:]
        dout, dx = gradients[0].contiguous(), torch.empty_like(x)
        dgate, rows = torch.empty_like(dout), x.numel() // value_dim
        programs = triton.cdiv(rows, BLOCK_ROWS)
        dweight = torch.empty(programs, value_dim, device=x.device)
        gated_norm_backward_kernel[(programs,)](
            x, gate, gate.stride(1), weight, dout, dx, dgate, dweight, rows, HEADS=heads, VALUE=value_dim,
            BLOCK_V=triton.next_power_of_2(value_dim), BLOCK_R=BLOCK_ROWS, EPS=NORM_EPS, num_warps=4,
        )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over each head of x [B, T, H, V] with one weight [V], times SiLU of gate [B, T, H * V] -> [B, T, H * V],
    differentiable in all. The gate may be columns of longer rows."""
    return _GatedNorm.apply(x, gate, weight)
