"""Before a decode step's attention: norms and rotary of queries and keys, and the write into the KV cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.pdl import pdl_launch, wait


@triton.jit
def rotary_write_kernel(
    row, positions, cos, sin, q_weight, k_weight, q_out, keys, values,
    row_stride, table_stride, key_batch, key_head, key_slot, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + sequence)
    slot = position % slots
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HALF
    at = row + sequence * row_stride + head * DIM
    low = tl.load(at + lanes, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF + lanes, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            factor = tl.rsqrt((tl.sum(low * low) + tl.sum(high * high)) / DIM + EPS)
            weight = q_weight
            if head >= HEADS:
                weight = k_weight
            low = low * factor * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
            high = high * factor * tl.load(weight + HALF + lanes, mask=inside, other=0.0).to(tl.float32)
        # Both halves of a rotary table are equal.
        c = tl.load(cos + sequence * table_stride + lanes, mask=inside, other=0.0)
        s = tl.load(sin + sequence * table_stride + lanes, mask=inside, other=0.0)
        rotated = low * c - high * s
        high = high * c + low * s
        low = rotated
    if head < HEADS:
        to = q_out + (sequence * HEADS + head) * DIM
    elif head < HEADS + KV_HEADS:
        to = keys + sequence * key_batch + (head - HEADS) * key_head + slot * key_slot
    else:
        to = values + sequence * key_batch + (head - HEADS - KV_HEADS) * key_head + slot * key_slot
    kind = q_out.dtype.element_ty
    tl.store(to + lanes, low.to(kind), mask=inside)
    tl.store(to + HALF + lanes, high.to(kind), mask=inside)


def rotary_write(
    row: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, heads: int,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Norms (if any) and rotates queries and keys, and writes the new keys and values into the cache.

    Args:
        row: packed q, k, v projections [B, (H + 2 Hkv) * D].
        positions: [B] int64; the slot is position % N.
        cos, sin: rotary tables at the positions, [B, D] fp32 of equal strides (0 for one position), halves equal.
        keys, values: [B, Hkv, N, D] with equal strides, in row's dtype.
        q_weight, k_weight: [D] of the RMSNorms of queries and keys, both or none.

    Returns:
        Rotated queries [B, H, D].
    """
    batch, kv_heads, slots, dim = keys.shape
    q = torch.empty(batch, heads, dim, device=row.device, dtype=row.dtype)
    norm = q_weight is not None
    rotary_write_kernel[(batch, heads + 2 * kv_heads)](
        row, positions, cos, sin, q_weight if norm else row, k_weight if norm else row, q, keys, values,
        row.stride(0), cos.stride(0), keys.stride(0), keys.stride(1), keys.stride(2), slots,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2),
        NORM=norm, EPS=eps, num_warps=1, **pdl_launch(row.device),
    )  # fmt: skip
    return q
