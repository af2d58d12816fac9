"""The static short convolution of one new token, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.pdl import pdl_launch, wait
from nasbench_kernels.common.tile import silu


@triton.jit
def conv_step_kernel(
    row, weight, conv_state, row_stride,
    SIZE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < SIZE
    tap = tl.arange(0, BLOCK_T)[:, None]
    both = inside[None, :] & (tap < TAPS)
    taps = tl.load(weight + channel[None, :] * TAPS + tap, mask=both, other=0.0).to(tl.float32)
    wait(PDL)
    at = row + sequence * row_stride + channel
    past = conv_state + (sequence * (TAPS - 1) + tap) * SIZE + channel[None, :]
    newest = tl.load(at, mask=inside, other=0.0)
    earlier = tl.load(past, mask=inside[None, :] & (tap < TAPS - 1), other=0.0)
    inputs = tl.where(tap == TAPS - 1, newest.to(earlier.dtype)[None, :], earlier)
    mixed = tl.sum(inputs.to(tl.float32) * taps, 0)
    # Several threads may hold one element: all must have read before any writes.
    tl.debug_barrier()
    tl.store(past - SIZE, inputs, mask=both & (tap > 0))
    tl.store(at, silu(mixed).to(row.dtype.element_ty), mask=inside)


def conv_step(row: Tensor, weight: Tensor, conv_state: Tensor) -> None:
    """Static causal convolution and SiLU of the first C columns of rows [B, P], in place; weight [C, W], conv_state
    [B, W-1, C], shifted in place."""
    size, taps = weight.shape
    block = 256
    conv_step_kernel[(row.shape[0], triton.cdiv(size, block))](
        row, weight, conv_state, row.stride(0),
        SIZE=size, TAPS=taps, BLOCK_T=triton.next_power_of_2(taps), BLOCK=block, num_warps=2, **pdl_launch(row.device),
    )  # fmt: skip
