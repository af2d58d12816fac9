"""Attention of one new token per sequence over a static KV cache.

The context is split over programs. Each goes through its split with an online softmax, and a second kernel reduces the
splits. The query heads of a group are the rows of one product, so keys and values are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.launch import sm_limits
from nasbench_kernels.common.pdl import pdl_launch, wait

LOG2E = 1.4426950408889634


@triton.jit
def decode_attention_kernel(
    q, keys, values, positions, out, parts, weights,
    key_batch, key_head, key_slot, slots, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)  # the newest key and value are what the launch before writes
    program = tl.program_id(0)
    split = program % SPLITS
    pair = (program // SPLITS).to(tl.int64)
    sequence = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    length = tl.minimum(tl.load(positions + sequence).to(tl.int32) + 1, slots)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)

    rows = tl.arange(0, BLOCK_G)
    lanes = tl.arange(0, BLOCK_D)
    in_group = rows < GROUP
    in_dim = lanes < DIM
    heads = pair * GROUP + rows
    both = in_group[:, None] & in_dim[None, :]
    query = tl.load(q + heads[:, None] * DIM + lanes[None, :], mask=both, other=0.0)
    from_key = keys + sequence * key_batch + kv_head * key_head
    from_value = values + sequence * key_batch + kv_head * key_head
    highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        seen = slot < end
        offset = slot.to(tl.int64) * key_slot
        key = tl.load(from_key + offset[None, :] + lanes[:, None], mask=seen[None, :] & in_dim[:, None], other=0.0)
        scores = tl.dot(query, key, input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(from_value + offset[:, None] + lanes[None, :], mask=seen[:, None] & in_dim[None, :], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
        highest = higher
    if SPLITS == 1:
        result = mixed / total[:, None]
        tl.store(out + heads[:, None] * DIM + lanes[None, :], result.to(out.dtype.element_ty), mask=both)
    else:
        part = heads * SPLITS + split
        tl.store(parts + part[:, None] * DIM + lanes[None, :], mixed, mask=both)
        tl.store(weights + part * 2, highest, mask=in_group)
        tl.store(weights + part * 2 + 1, total, mask=in_group)


@triton.jit
def reduce_kernel(
    parts, weights, out,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    head = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    splits = tl.arange(0, BLOCK_S)
    inside = splits < SPLITS
    part = head * SPLITS + splits
    highest = tl.load(weights + part * 2, mask=inside, other=float("-inf"))
    total = tl.load(weights + part * 2 + 1, mask=inside, other=0.0)
    weight = tl.exp2(highest - tl.max(highest, 0))
    both = inside[:, None] & (lanes < DIM)[None, :]
    mixed = tl.load(parts + part[:, None] * DIM + lanes[None, :], mask=both, other=0.0)
    result = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + head * DIM + lanes, result.to(out.dtype.element_ty), mask=lanes < DIM)


def num_splits(programs: int, max_seqlen: int, multiprocessors: int, block_n: int) -> int:
    """Parts of the context: about eight programs for each place on the sm_limits, none shorter than four blocks."""
    wanted = -(-16 * multiprocessors // programs)
    if programs * 2 > 16 * multiprocessors:
        return 1
    longest = max(1, max_seqlen // (4 * block_n))
    if longest * programs < 2 * multiprocessors:  # too little work to fill the sm_limits: shorter parts
        longest = max(1, max_seqlen // block_n)
    return max(1, min(wanted, longest, 128))


def attention_launch(dim: int, element_size: int, shared_memory: int) -> tuple[int, int, int]:
    """(keys of a block, warps, pipeline stages) that fit two programs into a multiprocessor's shared memory."""
    block_n = 64 if element_size == 2 else 32
    tile = 2 * block_n * triton.next_power_of_2(dim) * element_size
    stages = max(1, min(4, shared_memory // 2 // tile))
    return block_n, 4, stages


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, max_seqlen: int) -> Tensor:
    """Exact softmax attention of one query per sequence and head.

    Args:
        q: [B, H, D], rotated.
        keys, values: [B, Hkv, N, D], equal strides; query head h reads key/value head h // (H / Hkv).
        positions: [B] int64: sequence b looks at min(positions[b] + 1, N) slots. In a ring buffer that has wrapped that
            is all of them, whose order does not matter.
        max_seqlen: host-side bound of positions + 1; it chooses the launch, not the result.

    Returns:
        [B, H, D] in q's dtype.
    """
    batch, kv_heads, slots, dim = keys.shape
    group = q.shape[1] // kv_heads
    multiprocessors, shared = sm_limits(q.device)
    block_n, warps, stages = attention_launch(dim, keys.element_size(), shared)
    programs = batch * kv_heads
    splits = num_splits(programs, min(max_seqlen, slots), multiprocessors, block_n)
    out = torch.empty_like(q)
    parts = weights = q
    if splits > 1:
        parts = torch.empty(batch * q.shape[1] * splits, dim, device=q.device, dtype=torch.float32)
        weights = torch.empty(batch * q.shape[1] * splits, 2, device=q.device, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(dim))  # the least that a product takes
    decode_attention_kernel[(programs * splits,)](
        q, keys, values, positions, out, parts, weights,
        keys.stride(0), keys.stride(1), keys.stride(2), slots, dim**-0.5 * LOG2E,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_N=block_n, SPLITS=splits, PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages, **pdl_launch(q.device),
    )  # fmt: skip
    if splits > 1:
        block = min(block_d, 32)
        reduce_kernel[(q.shape[0] * q.shape[1], triton.cdiv(dim, block))](
            parts, weights, out, DIM=dim, BLOCK_D=block, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4, **pdl_launch(q.device),
        )  # fmt: skip
    return out
