"""One decode step of RWKV7's time mixing, but for the products of the layer's input and the output's.

mix    token shift of the six inputs; the last input moves on
(products of the six inputs, `grouped_gemm`)
up     tanh or sigmoid of the low-rank projections' first half, and the second half
step   removal, decay, write, read, output norm, bonus and gate: the state is read and written once, in place
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.launch import sm_limits
from nasbench_kernels.common.pdl import pdl_launch, wait

BLOCK_R = 32
"""Ranks are multiples of it."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def token_mix_kernel(
    x, previous, mix, out, batch,
    COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < SIZE
    wait(PDL)
    at = sequence * SIZE + lanes
    new = tl.load(x + at, mask=inside, other=0.0)
    own = new.to(tl.float32)
    change = tl.load(previous + at, mask=inside, other=0.0).to(tl.float32) - own
    for i in tl.static_range(COUNT):
        share = tl.load(mix + i * SIZE + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + i * batch * SIZE + at, (own + change * share).to(out.dtype.element_ty), mask=inside)
    tl.store(previous + at, new.to(previous.dtype.element_ty), mask=inside)


@triton.jit
def rwkv7_up_kernel(
    low, w2, a2, g2, w0, a0, out, batch, low_stride,
    SIZE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (SIZE + BLOCK_D - 1) // BLOCK_D
    which = tl.program_id(0) // TILES
    lanes = tl.program_id(0) % TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_rows, inside = rows < batch, lanes < SIZE
    begin = tl.where(which == 0, 0, tl.where(which == 1, FIRST, SECOND))
    end = tl.where(which == 0, FIRST, tl.where(which == 1, SECOND, RANKS))
    weight, bias = w2, w0
    if which == 1:
        weight, bias = a2, a0
    if which == 2:
        weight = g2
    shift = tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    shift = tl.where(which == 2, 0.0, shift)  # the gate has none
    wait(PDL)
    kind = out.dtype.element_ty
    scale = tl.where(which == 0, 2.0, 1.0)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32) + shift[None, :]
    for start in tl.range(begin, end, BLOCK_R, num_stages=STAGES):
        ranks = start + tl.arange(0, BLOCK_R)
        at = rows[:, None].to(tl.int64) * low_stride + ranks[None, :]
        inner = tl.load(low + at, mask=in_rows[:, None], other=0.0).to(tl.float32)
        # tanh and sigmoid by one exponential.
        opened = _sigmoid(inner * scale) * scale - (scale - 1.0)
        given = tl.where(which == 1, inner, opened).to(kind)
        at = lanes[None, :] * (end - begin) + (ranks - begin)[:, None]
        weights = tl.load(weight + at, mask=inside[None, :], other=0.0)
        total = tl.dot(given, weights, total, input_precision=PRECISION)
    at = (which * batch + rows[:, None]).to(tl.int64) * SIZE + lanes[None, :]
    tl.store(out + at, total.to(kind), mask=in_rows[:, None] & inside[None, :])


@triton.jit
def rwkv7_step_kernel(
    rkv, raw, state, k_k, k_a, r_k, norm_weight, norm_bias, out, row_stride, raw_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    STRONGEST: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PROGRAMS: tl.constexpr = HEADS // TILES
    INNER: tl.constexpr = HEADS * DIM
    sequence = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first = tl.program_id(0) % PROGRAMS * TILES
    lanes = tl.arange(0, BLOCK)
    inside = lanes < DIM
    both = inside[:, None] & inside[None, :]
    memory = state + sequence * INNER * DIM + lanes[:, None] * DIM + lanes[None, :]
    if TILES == 1:
        # No launch just ahead writes it: this layer's last step did, launches ago.
        held = tl.load(memory + first * DIM * DIM, mask=both, other=0.0)
    wait(PDL)
    for head in tl.range(first, first + TILES, num_stages=STAGES):
        channel = head * DIM + lanes
        at = sequence * INNER + channel
        if TILES == 1:
            old = held.to(tl.float32)
        else:
            old = tl.load(memory + head * DIM * DIM, mask=both, other=0.0).to(tl.float32)
        projected = rkv + sequence * row_stride + channel
        r = tl.load(projected, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(projected + INNER, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(projected + 2 * INNER, mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(-STRONGEST * _sigmoid(tl.load(raw + at, mask=inside, other=0.0).to(tl.float32)))
        rate = _sigmoid(tl.load(raw + raw_stride + at, mask=inside, other=0.0).to(tl.float32))
        gate = tl.load(raw + 2 * raw_stride + at, mask=inside, other=0.0).to(tl.float32)
        removal = k * tl.load(k_k + channel, mask=inside, other=0.0).to(tl.float32)
        removal /= tl.maximum(tl.sqrt(tl.sum(removal * removal)), 1e-12)
        k *= 1.0 + (rate - 1.0) * tl.load(k_a + channel, mask=inside, other=0.0).to(tl.float32)
        removed = tl.sum(old * removal[:, None], 0)
        new = old * decay[:, None] - (removal * rate)[:, None] * removed[None, :] + k[:, None] * v[None, :]
        tl.store(memory + head * DIM * DIM, new.to(state.dtype.element_ty), mask=both)
        y = tl.sum(new * r[:, None], 0)
        centred = tl.where(inside, y - tl.sum(y) / DIM, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred) / DIM + EPS)
        weight = tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32)
        normed = centred * scale * weight + tl.load(norm_bias + channel, mask=inside, other=0.0).to(tl.float32)
        bonus = tl.sum(r * k * tl.load(r_k + channel, mask=inside, other=0.0).to(tl.float32))
        tl.store(out + at, ((normed + bonus * v) * gate).to(out.dtype.element_ty), mask=inside)


def token_mix(x: Tensor, previous: Tensor, mix: Tensor, count: int) -> Tensor:
    """x + (previous - x) mix_i of the first `count` rows of mix [>= count, C]: x and previous [B, C] -> [count, B, C].
    `previous` becomes x, in place."""
    batch, size = x.shape
    out = torch.empty(count, batch, size, device=x.device, dtype=x.dtype)
    block = min(1024, triton.next_power_of_2(size))
    token_mix_kernel[(batch, triton.cdiv(size, block))](
        x, previous, mix, out, batch, COUNT=count, SIZE=size, BLOCK=block, num_warps=4, **pdl_launch(x.device)
    )
    return out


def low_ranks(low: Tensor, ups: tuple[Tensor, Tensor, Tensor], biases: tuple[Tensor, Tensor]) -> Tensor:
    """w0 + tanh(x^w W1) W2, a0 + x^a A1 A2 and sigmoid(x^g G1) G2 of one token.

    Args:
        low: x^w W1, x^a A1 and x^g G1 side by side, [B, R]; each rank is a multiple of BLOCK_R.
        ups: W2, A2 and G2, [D, rank].

    Returns:
        [3, B, D] in low's dtype.
    """
    (batch, ranks), inner = low.shape, ups[0].shape[0]
    first = ups[0].shape[1]
    out = torch.empty(3, batch, inner, device=low.device, dtype=low.dtype)
    block_b = 32 if batch > 16 else 16
    rwkv7_up_kernel[(3 * triton.cdiv(inner, 64), triton.cdiv(batch, block_b))](
        low, *ups, *biases, out, batch, low.stride(0), SIZE=inner, FIRST=first, SECOND=first + ups[1].shape[1],
        RANKS=ranks, BLOCK_B=block_b, BLOCK_R=BLOCK_R, BLOCK_D=64, STAGES=3,
        PRECISION="ieee" if low.dtype == torch.float32 else "tf32", num_warps=4, **pdl_launch(low.device),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class StepLaunch:
    """Heads that a program takes one after the other, the next ones' states on their way; a single head's state is
    held in registers."""

    tiles: int = 1
    warps: int = 4
    stages: int = 1


def rwkv7_fused_step(
    rkv: Tensor, raw: Tensor, state: Tensor, k_k: Tensor, k_a: Tensor, r_k: Tensor, norm: tuple[Tensor, Tensor],
    *, strongest: float, eps: float, launch: StepLaunch | None = None,
) -> Tensor:  # fmt: skip
    """The recurrence of one token and what stands around it.

    Args:
        rkv: rows that begin with receptance, key and value, [B, >= 3 D] with D = H P.
        raw: of decay and rate before their sigmoid, and the gate, [3, B, D].
        state: [B, H, P, P] fp32 or bf16, written in place. Not by the launch just before this one.
        norm: weight and bias [D] of the norm of every head, whose eps is `eps`.
        strongest: the decay is exp(-strongest sigmoid(raw)).

    Returns:
        [B, D] in rkv's dtype.
    """
    batch, heads, dim, _ = state.shape
    if launch is None:
        many = batch * heads >= 32 * sm_limits(rkv.device)[0] and heads % 4 == 0
        # One H200, 32 heads of 64 x 64 in fp32: at batch 256 77 us, with two warps 100, one head a program 86; at batch
        # 64 25, 28 and 24.
        launch = StepLaunch(4, 1, 3) if many else StepLaunch()
    out = torch.empty(batch, heads * dim, device=rkv.device, dtype=rkv.dtype)
    rwkv7_step_kernel[(batch * heads // launch.tiles,)](
        rkv, raw, state, k_k, k_a, r_k, *norm, out, rkv.stride(0), raw.stride(0),
        HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), TILES=launch.tiles, STAGES=launch.stages,
        STRONGEST=strongest, EPS=eps, num_warps=launch.warps, **pdl_launch(rkv.device),
    )  # fmt: skip
    return out
