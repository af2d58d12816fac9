"""What stands around the gated delta rule in prefill, one launch before it and one after it.

Both read parts of the stacked projections' rows where they lie: a split, an activation, a norm and a cast of their own
would each write the part to memory once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.decode.recurrent import L2_EPS, NORM_EPS, RowLayout


@triton.jit
def rule_inputs_kernel(
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
        query = query / (1.0 + tl.exp(-query))
        key = key / (1.0 + tl.exp(-key))
    query *= tl.rsqrt(tl.sum(query * query, 1) + EPS)[:, None]
    key *= tl.rsqrt(tl.sum(key * key, 1) + EPS)[:, None]
    tl.store(q + target, query.to(q.dtype.element_ty), mask=inside)
    tl.store(k + target, key.to(k.dtype.element_ty), mask=inside)

    gates = row + index * row_stride + head
    step = tl.load(gates + decay_at, mask=in_rows, other=0.0).to(tl.float32) + tl.load(dt_bias + head)
    softplus = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    strength = tl.load(gates + beta_at, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(g + index * HEADS + head, -tl.exp(tl.load(a_log + head)) * softplus, mask=in_rows)
    tl.store(beta + index * HEADS + head, 1.0 / (1.0 + tl.exp(-strength)), mask=in_rows)


def rule_inputs(
    row: Tensor, layout: RowLayout, key_dim: int, a_log: Tensor, dt_bias: Tensor, mixed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k of norm 1, log decay and writing strength, from stacked rows [B, T, P] -> q, k [B, T, H, K] in the rows'
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
    rows, block = batch * tokens, 32
    rule_inputs_kernel[(triton.cdiv(rows, block), heads)](
        source[..., q_at:], source[..., k_at:], source.stride(1), row, row.stride(1), layout.decay, layout.beta,
        a_log, dt_bias, q, k, g, beta, rows,
        HEADS=heads, KEY=key_dim, BLOCK_K=triton.next_power_of_2(key_dim), BLOCK_R=block,
        ACTIVATE=mixed is None, EPS=L2_EPS, num_warps=4,
    )  # fmt: skip
    return q, k, g, beta


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


def gated_norm(x: Tensor, row: Tensor, gate_at: int, weight: Tensor) -> Tensor:
    """RMSNorm over each head of x [B, T, H, V], times SiLU of columns gate_at.. of rows [B, T, P] -> [B, T, H * V]."""
    batch, tokens, heads, value_dim = x.shape
    out = torch.empty(batch, tokens, heads * value_dim, device=x.device, dtype=row.dtype)
    rows, block = batch * tokens, 16
    gated_norm_kernel[(triton.cdiv(rows, block), heads)](
        x, row[..., gate_at:], weight, out, rows, row.stride(1),
        HEADS=heads, VALUE=value_dim, BLOCK_V=triton.next_power_of_2(value_dim), BLOCK_R=block, EPS=NORM_EPS,
        num_warps=4,
    )  # fmt: skip
    return out
