"""RMSNorm of y * SiLU(z) over the channels of a group, for prompts and decode steps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.pdl import pdl_launch, wait
from nasbench_kernels.common.tile import silu

BLOCK = 4096
"""Channels that a program holds at once."""


@triton.jit
def inputs_of(columns, past, channel, inside, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The last W inputs of channels, [BLOCK_T, channels] fp32."""
    tap = tl.arange(0, BLOCK_T)[:, None]
    newest = tl.load(columns + channel, mask=inside, other=0.0).to(tl.float32)
    before = inside[None, :] & (tap < TAPS - 1)
    earlier = tl.load(past + tap * CHANNELS + channel[None, :], mask=before, other=0.0).to(tl.float32)
    return tl.where(tap == TAPS - 1, newest[None, :], earlier)


@triton.jit
def keep_inputs(inputs, past, channel, inside, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Writes all but the oldest of the last W inputs of channels back."""
    tap = tl.arange(0, BLOCK_T)[:, None]
    moved = inside[None, :] & (tap > 0) & (tap < TAPS)
    # Several threads may hold one element: all must have read before any writes.
    tl.debug_barrier()
    tl.store(past + (tap - 1) * CHANNELS + channel[None, :], inputs.to(past.dtype.element_ty), mask=moved)


@triton.jit
def _gated(y, gate, at, inside):
    # Past the first-level cache, which does not see what other multiprocessors wrote.
    value = tl.load(y + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    return value * silu(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def normalise(y, gate, weight, out, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, EPS: tl.constexpr):
    """SIZE channels of y, gated by SiLU, over their root mean square, times a weight."""
    lanes = tl.arange(0, BLOCK_C)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK_C):
        value = _gated(y, gate, start + lanes, start + lanes < SIZE)
        squares += value * value
    factor = tl.rsqrt(tl.sum(squares) / SIZE + EPS)
    for start in tl.static_range(0, SIZE, BLOCK_C):
        inside = start + lanes < SIZE
        scale = tl.load(weight + start + lanes, mask=inside, other=0.0).to(tl.float32)
        value = _gated(y, gate, start + lanes, inside) * factor * scale
        tl.store(out + start + lanes, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_of_groups_kernel(
    y, row, weight, out, conv_state, row_stride,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, EPS: tl.constexpr, SHIFT: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    index = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    base = row + index * row_stride
    at = index * GROUPS * SIZE + group * SIZE
    if SHIFT:
        # Here, not in the step: all heads of a group read these inputs.
        lanes = tl.arange(0, BLOCK_S)
        channel = GROUPS * SIZE + group * WIDTH + lanes
        past = conv_state + index * (TAPS - 1) * CHANNELS
        inputs = inputs_of(base + GROUPS * SIZE, past, channel, lanes < WIDTH, CHANNELS, TAPS, BLOCK_T)
        keep_inputs(inputs, past, channel, lanes < WIDTH, CHANNELS, TAPS, BLOCK_T)
    normalise(y + at, base + group * SIZE, weight + group * SIZE, out + at, SIZE, BLOCK_C, EPS)


def gated_norm_of_groups(
    y: Tensor, row: Tensor, weight: Tensor, groups: int, eps: float, out: Tensor, conv_state: Tensor | None = None
) -> Tensor:
    """RMSNorm of y * SiLU(z) over each group's channels, times a weight [I], into `out`.

    Args:
        y: [R, I], any dtype, contiguous.
        row: [R, P] stacked projections: z, x, B, C, dt.
        conv_state: [R, W-1, I + 2 G N] for a decode step: its B and C columns move on by one token.
    """
    size = y.shape[-1] // groups
    taps, width, channels = 2, 1, 1
    if conv_state is not None:
        taps, channels = conv_state.shape[1] + 1, conv_state.shape[2]
        width = (channels - y.shape[-1]) // groups
    block = min(BLOCK, triton.next_power_of_2(size))
    gated_norm_of_groups_kernel[(y.shape[0] * groups,)](
        y, row, weight, out, row if conv_state is None else conv_state, row.stride(0),
        GROUPS=groups, SIZE=size, BLOCK_C=block, EPS=eps, SHIFT=conv_state is not None,
        WIDTH=width, CHANNELS=channels, TAPS=taps, BLOCK_T=triton.next_power_of_2(taps),
        BLOCK_S=triton.next_power_of_2(width), num_warps=min(8, max(1, block // 256)), **pdl_launch(row.device),
    )  # fmt: skip
    return out
