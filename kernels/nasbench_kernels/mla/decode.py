"""One decode step of latent attention: norm, rotation and cache in one launch, then attention over the latents.

All heads look at the same latents: they are the rows of one product, and a tile of the cache is read once, as keys and
as values. The context is split over programs as in nasbench_kernels.attention, whose reduction sums the splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.attention.decode import LOG2E, reduce_kernel
from nasbench_kernels.common.launch import sm_limits
from nasbench_kernels.common.pdl import pdl_launch, wait

BLOCK_H = 16
"""Heads of a program: the fewest rows that a product takes."""
MOST_SPLITS = 128


@triton.jit
def latent_write_kernel(
    row, positions, cos, sin, norm_weight, latents, q_rope, row_stride, table_stride, cache_stride,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr, EPS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = ROPE // 2
    sequence = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_L)
    half = tl.arange(0, BLOCK_HALF)
    heads = tl.arange(0, BLOCK_HEADS)
    in_latent, in_half = lanes < LATENT, half < HALF
    weight = tl.load(norm_weight + lanes, mask=in_latent, other=0.0).to(tl.float32)
    wait(PDL)
    base = row + sequence * row_stride
    kv = base + HEADS * (NOPE + ROPE)
    table = sequence * table_stride + half
    # Both halves of a table are equal.
    cosine = tl.load(cos + table, mask=in_half, other=0.0)
    sine = tl.load(sin + table, mask=in_half, other=0.0)
    kind = latents.dtype.element_ty
    slot = latents + sequence * cache_stride + tl.load(positions + sequence) * (LATENT + ROPE)
    latent = tl.load(kv + lanes, mask=in_latent, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(latent * latent) / LATENT + EPS)
    tl.store(slot + lanes, (latent * scale * weight).to(kind), mask=in_latent)
    first = tl.load(kv + LATENT + half, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(kv + LATENT + HALF + half, mask=in_half, other=0.0).to(tl.float32)
    tl.store(slot + LATENT + half, (first * cosine - second * sine).to(kind), mask=in_half)
    tl.store(slot + LATENT + HALF + half, (second * cosine + first * sine).to(kind), mask=in_half)
    both = (heads < HEADS)[:, None] & in_half[None, :]
    at = base + heads[:, None] * (NOPE + ROPE) + NOPE + half[None, :]
    first = tl.load(at, mask=both, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=both, other=0.0).to(tl.float32)
    out = q_rope + (sequence * HEADS + heads[:, None]) * ROPE + half[None, :]
    tl.store(out, (first * cosine[None, :] - second * sine[None, :]).to(q_rope.dtype.element_ty), mask=both)
    tl.store(out + HALF, (second * cosine[None, :] + first * sine[None, :]).to(q_rope.dtype.element_ty), mask=both)


@triton.jit
def latent_attention_kernel(
    q, q_rope, latents, positions, out, parts, weights, batch, cache_stride, slots, scale,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)  # the newest latent is what a launch just before writes
    GROUPS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    split = tl.program_id(0) % SPLITS
    sequence = (tl.program_id(0) // (SPLITS * GROUPS)).to(tl.int64)
    heads = tl.program_id(0) // SPLITS % GROUPS * BLOCK_H + tl.arange(0, BLOCK_H)
    length = tl.minimum(tl.load(positions + sequence).to(tl.int32) + 1, slots)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)

    lanes, turned = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    in_heads, in_latent, in_rope = heads < HEADS, lanes < LATENT, turned < ROPE
    rows = heads * batch + sequence  # of [H, B, L]
    both = in_heads[:, None] & in_latent[None, :]
    query = tl.load(q + rows[:, None] * LATENT + lanes[None, :], mask=both, other=0.0)
    at = (sequence * HEADS + heads[:, None]) * ROPE + turned[None, :]
    rotated = tl.load(q_rope + at, mask=in_heads[:, None] & in_rope[None, :], other=0.0)
    memory = latents + sequence * cache_stride
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mixed = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
    for first in range(begin, end, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        seen = slot < end
        offset = slot.to(tl.int64) * (LATENT + ROPE)
        latent = tl.load(memory + offset[:, None] + lanes[None, :], mask=seen[:, None] & in_latent[None, :], other=0.0)
        key = tl.load(
            memory + offset[None, :] + LATENT + turned[:, None], mask=seen[None, :] & in_rope[:, None], other=0.0
        )
        scores = tl.dot(query, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(rotated, key, scores, input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(latent.dtype), latent, mixed * shrink[:, None], input_precision=PRECISION)
        highest = higher
    if SPLITS == 1:
        result = mixed / total[:, None]
        tl.store(out + rows[:, None] * LATENT + lanes[None, :], result.to(out.dtype.element_ty), mask=both)
    else:
        part = rows * SPLITS + split
        tl.store(parts + part[:, None] * LATENT + lanes[None, :], mixed, mask=both)
        tl.store(weights + part * 2, highest, mask=in_heads)
        tl.store(weights + part * 2 + 1, total, mask=in_heads)


def latent_write(
    row: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor, latents: Tensor, heads: int,
    nope: int, *, eps: float,
) -> Tensor:  # fmt: skip
    """Norms the new latents, rotates the new keys, and writes both to their slots of the cache.

    Args:
        row: projections [B, H (nope + R) + L + R]: each head's query and rotary query, latent, rotary key.
        positions: [B] int64.
        cos, sin: [B, R] fp32 of these positions, halves equal.
        norm_weight: [L].
        latents: [B, N, L + R], written in place.

    Returns:
        The rotated queries, [B, H, R] in row's dtype.
    """
    latent = norm_weight.shape[0]
    rope = latents.shape[2] - latent
    q_rope = torch.empty(len(row), heads, rope, device=row.device, dtype=row.dtype)
    latent_write_kernel[(len(row),)](
        row, positions, cos, sin, norm_weight, latents, q_rope, row.stride(0), cos.stride(0), latents.stride(0),
        HEADS=heads, NOPE=nope, ROPE=rope, LATENT=latent, EPS=eps, BLOCK_HEADS=triton.next_power_of_2(heads),
        BLOCK_HALF=triton.next_power_of_2(rope // 2), BLOCK_L=triton.next_power_of_2(latent), num_warps=4,
        **pdl_launch(row.device),
    )  # fmt: skip
    return q_rope


def num_splits(programs: int, max_seqlen: int, places: int, block_n: int) -> int:
    """Parts of the context: the fewest that fill the places of the card in whole rounds; every part writes as many
    numbers as a whole head has. None is shorter than four blocks."""
    longest = max(1, min(MOST_SPLITS, max_seqlen // (4 * block_n)))
    for splits in range(1, longest):
        rounds = programs * splits / places
        if rounds >= 0.9 * -(-programs * splits // places):
            return splits
    return longest


def latent_launch(width: int, element_size: int, shared_memory: int) -> tuple[int, int]:
    """(tokens of a tile, pipeline stages) for tiles `width` numbers wide, such that two programs of 4 warps share a
    multiprocessor. Share of a plain read on one H200 of 132 multiprocessors, tiles of 64 tokens, with 8 and 4 warps:
    0.74 and 0.61 by 128 programs, 0.84 and 0.98 by 256; tiles of 32 with 4 warps: 0.97 by 256."""
    for block_n, stages in ((32, 3), (32, 2), (16, 3)):
        if 2 * ((block_n * (stages - 1) + BLOCK_H) * width * element_size + (2 << 10)) <= shared_memory:
            return block_n, stages
    return 16, 2


def latent_attention(
    q: Tensor, q_rope: Tensor, latents: Tensor, positions: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """Arguments and result of `naive_latent_attention`, the result in q's dtype.

    Args:
        max_seqlen: host-side bound of positions + 1; it chooses the launch, not the result.
    """
    heads, batch, latent = q.shape
    slots, rope = latents.shape[1], q_rope.shape[2]
    block_l, block_r = (max(16, triton.next_power_of_2(size)) for size in (latent, rope))
    multiprocessors, shared = sm_limits(q.device)
    block_n, stages = latent_launch(block_l + block_r, latents.element_size(), shared)
    programs = batch * triton.cdiv(heads, BLOCK_H)
    splits = num_splits(programs, min(max_seqlen, slots), 2 * multiprocessors, block_n)
    out = torch.empty_like(q)
    parts = weights = q
    if splits > 1:
        parts = torch.empty(heads * batch * splits, latent, device=q.device, dtype=torch.float32)
        weights = torch.empty(heads * batch * splits, 2, device=q.device, dtype=torch.float32)
    latent_attention_kernel[(programs * splits,)](
        q, q_rope, latents, positions, out, parts, weights, batch, latents.stride(0), slots, scale * LOG2E,
        HEADS=heads, LATENT=latent, ROPE=rope, BLOCK_H=BLOCK_H, BLOCK_L=block_l, BLOCK_R=block_r, BLOCK_N=block_n,
        SPLITS=splits, PRECISION="ieee" if latents.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=stages, **pdl_launch(q.device),
    )  # fmt: skip
    if splits > 1:
        block = min(block_l, max(32, 4096 // triton.next_power_of_2(splits)))
        reduce_kernel[(heads * batch, triton.cdiv(latent, block))](
            parts, weights, out, DIM=latent, BLOCK_D=block, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4, **pdl_launch(q.device),
        )  # fmt: skip
    return out
