"""What stands before the gated delta rule: SiLU and norm of q and k, log decay and beta, in one launch.

It reads the parts of the packed projections' rows where they lie. As PyTorch operations, split, activation, norm and
cast would each write their part to memory once more, some of them in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.tile import silu
from nasbench_kernels.gated_delta.naive import L2_EPS, RowLayout

BLOCK_ROWS = 32
"""Tokens of a program."""


@triton.jit
def recurrence_inputs_kernel(
    queries, keys, stride, row, row_stride, decay_at, beta_at, a_log, dt_bias, q, k, g, beta, ROWS,
    HEADS: tl.constexpr, KEY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACTIVATE: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    index = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = index < ROWS
    index = index.to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    inside = in_rows[:, None] & (lanes < KEY)[None, :]
    source = index[:, None] * stride + head * KEY + lanes[None, :]
    target = (index[:, None] * HEADS + head) * KEY + lanes[None, :]
    query = tl.load(queries + source, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(keys + source, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATE:
        query = silu(query)
        key = silu(key)
    query *= tl.rsqrt(tl.sum(query * query, 1) + EPS)[:, None]
    key *= tl.rsqrt(tl.sum(key * key, 1) + EPS)[:, None]
    tl.store(q + target, query.to(q.dtype.element_ty), mask=inside)
    tl.store(k + target, key.to(k.dtype.element_ty), mask=inside)

    gates = row + index * row_stride + head
    step = tl.load(gates + decay_at, mask=in_rows, other=0.0).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    softplus = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    beta_logit = tl.load(gates + beta_at, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(g + index * HEADS + head, -tl.exp(tl.load(a_log + head).to(tl.float32)) * softplus, mask=in_rows)
    tl.store(beta + index * HEADS + head, 1.0 / (1.0 + tl.exp(-beta_logit)), mask=in_rows)


def recurrence_inputs(
    row: Tensor, layout: RowLayout, key_dim: int, a_log: Tensor, dt_bias: Tensor, mixed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k of norm 1, log decay and beta, from packed rows [B, T, P] -> q, k [B, T, H, K] in the rows'
    dtype, g, beta [B, T, H] fp32.

    Args:
        mixed: convolved and activated queries and keys in the first 2 H K columns of [B, T, >= 2 H K]; without it
            the rows' own are taken and activated.
    """
    batch, tokens, _ = row.shape
    heads = a_log.shape[0]
    source = row if mixed is None else mixed
    q_at, k_at = (layout.q, layout.k) if mixed is None else (0, heads * key_dim)
    q = torch.empty(batch, tokens, heads, key_dim, device=row.device, dtype=row.dtype)
    k = torch.empty_like(q)
    g = torch.empty(batch, tokens, heads, device=row.device, dtype=torch.float32)
    beta = torch.empty_like(g)
    rows = batch * tokens
    recurrence_inputs_kernel[(triton.cdiv(rows, BLOCK_ROWS), heads)](
        source[..., q_at:], source[..., k_at:], source.stride(1), row, row.stride(1), layout.decay, layout.beta,
        a_log, dt_bias, q, k, g, beta, rows,
        HEADS=heads, KEY=key_dim, BLOCK_K=triton.next_power_of_2(key_dim), BLOCK_R=BLOCK_ROWS,
        ACTIVATE=mixed is None, EPS=L2_EPS, num_warps=4,
    )  # fmt: skip
    return q, k, g, beta


@triton.jit
def _unit(x, EPS: tl.constexpr):
    """(SiLU of x [R, K], 1 / its norm [R])."""
    active = x * tl.sigmoid(x)
    return active, tl.rsqrt(tl.sum(active * active, 1) + EPS)


@triton.jit
def _through_unit(x, dy, EPS: tl.constexpr):
    """Gradient of x [R, K], from that of its SiLU brought to norm 1."""
    active, size = _unit(x, EPS)
    unit = active * size[:, None]
    dactive = size[:, None] * (dy - unit * tl.sum(unit * dy, 1)[:, None])
    opening = tl.sigmoid(x)
    return dactive * opening * (1.0 + x * (1.0 - opening))


@triton.jit
def recurrence_inputs_backward_kernel(
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
    beta = tl.sigmoid(tl.load(gates + HEADS, mask=in_rows, other=0.0).to(tl.float32))
    dbeta_logit = tl.load(dbeta + index * HEADS + head, mask=in_rows, other=0.0).to(tl.float32) * beta * (1.0 - beta)
    out = drow + index * out_stride + decay_at + head
    tl.store(out, ddecay.to(drow.dtype.element_ty), mask=in_rows)
    tl.store(out + HEADS, dbeta_logit.to(drow.dtype.element_ty), mask=in_rows)
    sums = tl.program_id(0) * HEADS + head
    tl.store(da_log + sums, -rate * tl.sum(decay * softplus, 0))
    tl.store(ddt_bias + sums, tl.sum(ddecay, 0))


class _RecurrenceInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row: Tensor, a_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        row, begin = row.contiguous(), 2 * heads * key_dim
        end = begin + sum(sizes)
        ctx.save_for_backward(row, a_log, dt_bias)
        ctx.heads, ctx.key_dim, ctx.sizes = heads, key_dim, sizes
        layout = RowLayout(0, heads * key_dim, begin, begin, end, end + heads)
        inputs = recurrence_inputs(row, layout, key_dim, a_log, dt_bias)
        return *inputs, *row[..., begin:end].split(sizes, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row, a_log, dt_bias = ctx.saved_tensors
        dq, dk, dg, dbeta = (x.contiguous() for x in gradients[:4])
        batch, tokens, width = row.shape
        begin, end = 2 * ctx.heads * ctx.key_dim, 2 * ctx.heads * ctx.key_dim + sum(ctx.sizes)
        drow = torch.empty_like(row)
        programs = triton.cdiv(batch * tokens, BLOCK_ROWS)
        da_log, ddt_bias = (torch.empty(programs, ctx.heads, device=row.device) for _ in range(2))
        recurrence_inputs_backward_kernel[(programs, ctx.heads)](
            row, width, a_log, dt_bias, dq, dk, dg, dbeta, drow, width, da_log, ddt_bias, batch * tokens, end,
            HEADS=ctx.heads, KEY=ctx.key_dim, BLOCK_K=triton.next_power_of_2(ctx.key_dim), BLOCK_R=BLOCK_ROWS,
            EPS=L2_EPS, num_warps=4,
        )  # fmt: skip
        for part, change in zip(drow[..., begin:end].split(ctx.sizes, -1), gradients[4:], strict=True):
            part.copy_(change)
        drow[..., end + 2 * ctx.heads :] = 0
        return drow, da_log.sum(0).to(a_log.dtype), ddt_bias.sum(0).to(dt_bias.dtype), None, None, None


def training_inputs(
    row: Tensor, a_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, sizes: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Rows [B, T, P] of queries, keys, further parts of the given sizes, H log decays, H betas, and any
    padding -> q, k [B, T, H, K] after SiLU and of norm 1, g, beta [B, T, H] fp32, and each further part [B, T, size].

    Differentiable in the rows, a_log and dt_bias, [H] each.
    """
    return _RecurrenceInputs.apply(row, a_log, dt_bias, heads, key_dim, sizes)
