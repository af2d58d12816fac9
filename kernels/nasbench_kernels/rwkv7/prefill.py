"""What stands around RWKV7's recurrence in a prompt, one launch each: token shift, the recurrence's inputs, the output.

The recurrence itself is flash-linear-attention's `chunk_rwkv7`, or the plain chunked form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def token_mixes_kernel(
    x, last, mix, out, ROWS, TOKENS, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < SIZE
    at = index * SIZE + lanes
    own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if index % TOKENS == 0:
        before = tl.load(last + index // TOKENS * SIZE + lanes, mask=inside, other=0.0).to(tl.float32)
    else:
        before = tl.load(x + at - SIZE, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(COUNT):
        share = tl.load(mix + i * SIZE + lanes, mask=inside, other=0.0).to(tl.float32)
        mixed = own + (before - own) * share
        tl.store(out + i * ROWS * SIZE + at, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rwkv7_inputs_kernel(
    k, w_raw, a_raw, k_k, k_a, decay, replaced, a, b, ROWS,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, STRONGEST: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * DIM + lanes
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = index[:, None] * (HEADS * DIM) + channel[None, :]
    inside = (index < ROWS)[:, None] & (lanes < DIM)[None, :]
    key = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    rate = _sigmoid(tl.load(a_raw + at, mask=inside, other=0.0).to(tl.float32))
    removal = key * tl.load(k_k + channel, mask=lanes < DIM, other=0.0).to(tl.float32)[None, :]
    removal /= tl.maximum(tl.sqrt(tl.sum(removal * removal, 1)), 1e-12)[:, None]
    share = tl.load(k_a + channel, mask=lanes < DIM, other=0.0).to(tl.float32)[None, :]
    raw = tl.load(w_raw + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(decay + at, -STRONGEST * _sigmoid(raw), mask=inside)
    kind = replaced.dtype.element_ty
    tl.store(replaced + at, (key * (1.0 + (rate - 1.0) * share)).to(kind), mask=inside)
    tl.store(a + at, (-removal).to(kind), mask=inside)
    tl.store(b + at, (removal * rate).to(kind), mask=inside)


@triton.jit
def rwkv7_output_kernel(
    y, r, k, v, gate, r_k, norm_weight, norm_bias, out, ROWS,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * DIM + lanes
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = index[:, None] * (HEADS * DIM) + channel[None, :]
    inside = (index < ROWS)[:, None] & (lanes < DIM)[None, :]
    mixed = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, mixed - (tl.sum(mixed, 1) / DIM)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / DIM + EPS)
    weight = tl.load(norm_weight + channel, mask=lanes < DIM, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + channel, mask=lanes < DIM, other=0.0).to(tl.float32)
    reading = tl.load(r + at, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(r_k + channel, mask=lanes < DIM, other=0.0).to(tl.float32)
    bonus = tl.sum(reading * key * share[None, :], 1)
    value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out + at, ((normed + bonus[:, None] * value) * opened).to(out.dtype.element_ty), mask=inside)


def token_mixes(x: Tensor, last: Tensor, mix: Tensor) -> Tensor:
    """x + (x' - x) mix_i with x' the token before: x [B, T, C] contiguous, last [B, C] what is before the first token,
    mix [n, C] -> [n, B, T, C]."""
    batch, tokens, size = x.shape
    out = torch.empty(len(mix), batch, tokens, size, device=x.device, dtype=x.dtype)
    block = min(1024, triton.next_power_of_2(size))
    token_mixes_kernel[(batch * tokens, triton.cdiv(size, block))](
        x, last, mix, out, batch * tokens, tokens, COUNT=len(mix), SIZE=size, BLOCK=block, num_warps=4
    )
    return out


def recurrence_inputs(
    k: Tensor, raw_decay: Tensor, raw_rate: Tensor, k_k: Tensor, k_a: Tensor, strongest: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log decay in fp32, replacement key, and a and b of `naive_rwkv7` in k's dtype, [B, T, H, P] each.

    Args:
        k: [B, T, H, P] contiguous, as projected.
        raw_decay, raw_rate: before their sigmoid, [B, T, H P] contiguous.
        k_k, k_a: [H P].
    """
    heads, dim = k.shape[-2:]
    rows = k.numel() // (heads * dim)
    decay = torch.empty_like(k, dtype=torch.float32)
    replaced, a, b = (torch.empty_like(k) for _ in range(3))
    rwkv7_inputs_kernel[(triton.cdiv(rows, BLOCK_ROWS), heads)](
        k, raw_decay, raw_rate, k_k, k_a, decay, replaced, a, b, rows, HEADS=heads, DIM=dim,
        BLOCK=triton.next_power_of_2(dim), BLOCK_R=BLOCK_ROWS, STRONGEST=strongest, num_warps=4,
    )  # fmt: skip
    return decay, replaced, a, b


def gated_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, r_k: Tensor, norm: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """(GroupNorm(y) + (r r_k k^T) v) gate per head: y, r, k, v [B, T, H, P], gate [B, T, H P], all contiguous; r_k, the
    norm's weight and bias [H P] -> [B, T, H P]."""
    heads, dim = y.shape[-2:]
    rows, out = y.numel() // (heads * dim), torch.empty_like(gate)
    rwkv7_output_kernel[(triton.cdiv(rows, BLOCK_ROWS), heads)](
        y, r, k, v, gate, r_k, *norm, out, rows, HEADS=heads, DIM=dim,
        BLOCK=triton.next_power_of_2(dim), BLOCK_R=BLOCK_ROWS, EPS=eps, num_warps=4,
    )  # fmt: skip
    return out
