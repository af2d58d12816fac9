"""What a decode step of a recurrence does to one head's inputs: read, convolve, widen, decay."""

from __future__ import annotations

import triton
import triton.language as tl

from nasbench_kernels.common.tile import silu


@triton.jit
def vector(at, lanes, inside, cos, sin, KEY: tl.constexpr, ROTARY: tl.constexpr):
    """Lanes of a head's query or key, fp32, rotated by the tables of its position."""
    x = tl.load(at + lanes, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        other = tl.load(at + (lanes + KEY // 2) % KEY, mask=inside, other=0.0).to(tl.float32)
        other = tl.where(lanes < KEY // 2, -other, other)
        x = x * tl.load(cos + lanes, mask=inside, other=0.0) + other * tl.load(sin + lanes, mask=inside, other=0.0)
    return x


@triton.jit
def held(weight, past, channel, inside, SIZE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Taps and earlier inputs of the static convolution of some channels, [taps, channels]."""
    tap = tl.arange(0, BLOCK_T)[:, None]
    taps = tl.load(weight + channel[None, :] * TAPS + tap, mask=inside[None, :] & (tap < TAPS), other=0.0)
    seen = inside[None, :] & (tap < TAPS - 1)
    return taps, tl.load(past + tap * SIZE + channel[None, :], mask=seen, other=0.0)


@triton.jit
def convolved(x, taps, earlier, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(the window's inputs, SiLU of the convolution)."""
    inputs = tl.where(tl.arange(0, BLOCK_T)[:, None] == TAPS - 1, x[None, :], earlier.to(tl.float32))
    return inputs, silu(tl.sum(inputs * taps.to(tl.float32), 0))


@triton.jit
def move_on(inputs, past, channel, inside, SIZE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr):
    tap = tl.arange(0, BLOCK_T)[:, None]
    at = past + (tap - 1) * SIZE + channel[None, :]
    tl.store(at, inputs.to(past.dtype.element_ty), mask=inside[None, :] & (tap > 0) & (tap < TAPS))


@triton.jit
def widened(at, middle, bias, lanes, inside, RANK: tl.constexpr):
    """A product of a narrow row, `middle` [RANK], for some of its outputs, rounded as the plain one is."""
    x = tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(RANK):
        weight = tl.load(at + lanes * RANK + rank, mask=inside, other=0.0).to(tl.float32)
        x += weight * tl.load(middle + rank).to(tl.float32)
    return x.to(middle.dtype.element_ty)


@triton.jit
def decay_of(x, shift, rate, sign):
    step = sign * x.to(tl.float32) + shift
    softplus = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    return tl.exp(-tl.exp(rate) * softplus)
