"""One decode step of Mamba2: convolution, activations, step size, state, skip, and then the gated output norm.

The state is nearly all of the traffic: it is read and written once, in place. A program owns a block of rows of a
head's [P, N] state, or several whole heads of one group, whose B and C it convolves once. The norm needs all heads of
a group. A second kernel does it and moves the inputs of B and C on, which all heads read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.launch import sm_limits
from nasbench_kernels.common.pdl import pdl_launch, wait
from nasbench_kernels.common.tile import silu
from nasbench_kernels.mamba2.norm import gated_norm_of_groups, inputs_of, keep_inputs


@triton.jit
def _kernel_of(weight, channel, inside, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    tap = tl.arange(0, BLOCK_T)[:, None]
    both = inside[None, :] & (tap < TAPS)
    return tl.load(weight + channel[None, :] * TAPS + tap, mask=both, other=0.0).to(tl.float32)


@triton.jit
def mamba2_step_kernel(
    row, conv_weight, conv_bias, conv_state, state, a_log, dt_bias, skip, y, row_stride, dt_min, dt_max,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    INNER: tl.constexpr = HEADS * DIM
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * STATE
    PROGRAMS: tl.constexpr = HEADS * PARTS // TILES
    sequence = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first = tl.program_id(0) % PROGRAMS * TILES  # tile
    begin = first % PARTS * BLOCK_P  # row in its head
    group = first // (HEADS // GROUPS * PARTS)
    base = row + sequence * row_stride
    columns = base + INNER
    past = conv_state + sequence * (TAPS - 1) * CHANNELS
    memory = state + sequence * INNER * STATE
    results = y + sequence * INNER
    lanes = tl.arange(0, BLOCK_N)
    in_state = lanes < STATE
    tile_rows = tl.arange(0, BLOCK_P)
    # Channels of x of all tiles, which leave no gaps: BLOCK_P divides DIM, unless there is one tile.
    mine = begin + tl.arange(0, BLOCK_P * TILES)
    in_mine = mine < DIM * TILES
    channel = first // PARTS * DIM + mine
    b_at = INNER + group * STATE + lanes
    c_at = b_at + GROUPS * STATE

    # What no launch just ahead writes: the state was written by this layer's last step, launches ago.
    if TILES == 1:
        at = memory + channel[:, None] * STATE + lanes[None, :]
        held = tl.load(at, mask=in_mine[:, None] & in_state[None, :], other=0.0)
    x_kernel = _kernel_of(conv_weight, channel, in_mine, TAPS, BLOCK_T)
    b_kernel = _kernel_of(conv_weight, b_at, in_state, TAPS, BLOCK_T)
    c_kernel = _kernel_of(conv_weight, c_at, in_state, TAPS, BLOCK_T)
    x_bias = tl.load(conv_bias + channel, mask=in_mine, other=0.0).to(tl.float32)
    b_bias = tl.load(conv_bias + b_at, mask=in_state, other=0.0).to(tl.float32)
    c_bias = tl.load(conv_bias + c_at, mask=in_state, other=0.0).to(tl.float32)
    wait(PDL)
    inputs = inputs_of(columns, past, channel, in_mine, CHANNELS, TAPS, BLOCK_T)
    b_inputs = inputs_of(columns, past, b_at, in_state, CHANNELS, TAPS, BLOCK_T)
    c_inputs = inputs_of(columns, past, c_at, in_state, CHANNELS, TAPS, BLOCK_T)
    x = silu(tl.sum(inputs * x_kernel, 0) + x_bias)
    b = tl.where(in_state, silu(tl.sum(b_inputs * b_kernel, 0) + b_bias), 0.0)
    c = tl.where(in_state, silu(tl.sum(c_inputs * c_kernel, 0) + c_bias), 0.0)
    keep_inputs(inputs, past, channel, in_mine, CHANNELS, TAPS, BLOCK_T)
    if TILES > 1:
        tl.store(results + channel, x, mask=in_mine)
        tl.debug_barrier()

    kind = state.dtype.element_ty
    for tile in tl.range(0, TILES, num_stages=STAGES):
        head = (first + tile) // PARTS
        row_of_head = (first + tile) % PARTS * BLOCK_P + tile_rows
        in_rows = row_of_head < DIM
        in_tile = in_rows[:, None] & in_state[None, :]
        rows = head * DIM + row_of_head
        at = memory + rows[:, None] * STATE + lanes[None, :]
        if TILES == 1:
            old = held.to(tl.float32)
            value = x
        else:
            old = tl.load(at, mask=in_tile, other=0.0).to(tl.float32)
            value = tl.load(results + rows, mask=in_rows, other=0.0)
        raw = tl.load(base + INNER + CHANNELS + head).to(tl.float32) + tl.load(dt_bias + head)
        softplus = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
        step = tl.minimum(tl.maximum(softplus, dt_min), dt_max)
        decay = tl.exp(-tl.exp(tl.load(a_log + head)) * step)
        new = old * decay + (value * step)[:, None] * b[None, :]
        tl.store(at, new.to(kind), mask=in_tile)
        mixed = tl.sum(new * c[None, :], 1) + value * tl.load(skip + head)
        tl.store(results + rows, mixed, mask=in_rows)


@dataclass(frozen=True)
class StepLaunch:
    """How the state of a sequence is divided: programs of `tiles` tiles of `block_p` rows of a head.

    Attributes:
        block_p: a power of two.
        tiles: tiles of one group that a program takes one after the other; `block_p` then divides a head's dimension.
            A single one is held in registers.
        stages: of the loop over several tiles, s - 1 of which are on their way.
    """

    block_p: int
    tiles: int = 1
    warps: int = 4
    stages: int = 1


TILE_ELEMENTS = 2048
"""Of the state that one warp of a launch for many heads holds at a time."""


def step_launch(batch: int, heads: int, heads_of_group: int, dim: int, size: int, sms: int) -> StepLaunch:
    """Four small tiles one after the other by one warp, two of them on their way, where there are many heads; else
    small blocks of rows.

    Chosen of 14 launches on an H200 for 80 heads of 64 x 128. The whole step with its norm, as a fraction of what an
    in-place pass over the states and the rest of the traffic take, at batch 64 and 256: 0.85 and 0.91 in fp32, 0.82
    and 0.91 in bf16. Tiles of four times the elements by two warps: 0.80, 0.90, 0.72, 0.85. One head a program: 0.67,
    0.70, 0.47, 0.47. With 8 and 80 groups at batch 64: 0.86 and 0.86. At batch 1 and 8 blocks of 8 rows took 5.4 and
    19.0 us, whole heads 6.5 and 22.8.
    """
    elements = triton.next_power_of_2(size)
    if batch * heads >= 8 * sms:
        block = min(dim & -dim, max(1, TILE_ELEMENTS // elements))
        while block > 1 and heads_of_group * (dim // block) % 4:
            block //= 2
        if heads_of_group * (dim // block) % 4 == 0:
            return StepLaunch(block, 4, warps=1, stages=3)
    return StepLaunch(max(1, min(triton.next_power_of_2(dim), 1024 // elements)), warps=1)


def fused_mamba2_step(
    row: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    launch: StepLaunch | None = None,
) -> Tensor:
    """A whole Mamba2 step between the input and the output projection, in two launches.

    Args:
        row: stacked projections [B, 2 I + 2 G N + H], contiguous rows: z, x, B, C, dt, with I = H P.
        conv_weight, conv_bias: [I + 2 G N, W] and [I + 2 G N].
        conv_state: the last W-1 inputs of x, B and C, [B, W-1, I + 2 G N], shifted in place.
        state: [B, H, P, N] fp32 or bf16, written in place. Not by the launch just before this one, which need not be
            done when the state is first read.
        a_log, dt_bias, skip: [H] fp32.
        norm_weight: [I].
        dt_limit: what step sizes are clamped to after softplus.

    Returns:
        [B, I] in row's dtype.
    """
    batch, heads, dim, size = state.shape
    taps, channels = conv_weight.shape[1], conv_weight.shape[0]
    groups = (channels - heads * dim) // (2 * size)
    sms, _ = sm_limits(row.device)
    launch = launch or step_launch(batch, heads, heads // groups, dim, size, sms)
    parts = triton.cdiv(dim, launch.block_p)
    if launch.tiles > 1 and (dim % launch.block_p or heads // groups * parts % launch.tiles):
        raise ValueError(f"{launch} does not divide {groups} groups of {heads // groups} heads of {dim}")
    y = torch.empty(batch, heads * dim, device=row.device, dtype=torch.float32)
    mamba2_step_kernel[(batch * heads * parts // launch.tiles,)](
        row, conv_weight, conv_bias, conv_state, state, a_log, dt_bias, skip, y, row.stride(0), *dt_limit,
        HEADS=heads, GROUPS=groups, DIM=dim, STATE=size, TAPS=taps, BLOCK_T=triton.next_power_of_2(taps),
        BLOCK_P=launch.block_p, BLOCK_N=triton.next_power_of_2(size), TILES=launch.tiles, PARTS=parts,
        STAGES=launch.stages, num_warps=launch.warps, **pdl_launch(row.device),
    )  # fmt: skip
    return gated_norm_of_groups(y, row, norm_weight, groups, eps, torch.empty_like(y, dtype=row.dtype), conv_state)
