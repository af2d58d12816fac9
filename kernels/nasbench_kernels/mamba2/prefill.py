"""The recurrence of Mamba2 over a prompt in Triton: a program takes channels of a head from chunk to chunk.

The state stays in registers in fp32. Operands of matrix products are in the inputs' dtype and accumulate in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.tile import decays, matrix
from nasbench_kernels.gated_delta.prefill import without_wgmma

CHUNK = 64
BLOCK_P = 32


@triton.jit
def mamba2_scan_kernel(
    x, x_stride, dt, decay, b, b_stride, c, c_stride, skip, state_in, state_out, out, T,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, INITIAL: tl.constexpr, SKIP: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    rows = tl.arange(0, CHUNK)
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_lanes, in_channels = lanes < STATE, channels < DIM
    kind = b.dtype.element_ty
    tile = (sequence * HEADS + head) * DIM * STATE + channels[:, None] * STATE + lanes[None, :]
    in_tile = in_channels[:, None] & in_lanes[None, :]
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if INITIAL:
        state = tl.load(state_in + tile, mask=in_tile, other=0.0).to(tl.float32)
    through = 0.0
    if SKIP:
        through = tl.load(skip + head)
    for n in tl.range(0, tl.cdiv(T, CHUNK), num_stages=STAGES):
        start = n * CHUNK
        in_rows = start + rows < T
        first = sequence * T + start
        step = tl.load(dt + (first + rows) * HEADS + head, mask=in_rows, other=0.0)
        rate = tl.load(decay + (first + rows) * HEADS + head, mask=in_rows, other=0.0)
        total = tl.cumsum(rate, 0)
        last = tl.sum(rate)
        keys = matrix(b + first * b_stride + group * STATE, rows, lanes, b_stride, in_rows, in_lanes)
        queries = matrix(c + first * c_stride + group * STATE, rows, lanes, c_stride, in_rows, in_lanes)
        values = matrix(x + first * x_stride + head * DIM, rows, channels, x_stride, in_rows, in_channels)
        values = values.to(tl.float32)
        moved = values * step[:, None]
        score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * decays(total, rows, in_rows, False)
        mixed = tl.dot(queries, tl.trans(state.to(kind)), input_precision=PRECISION) * tl.exp(total)[:, None]
        mixed = tl.dot(score.to(kind), moved.to(kind), mixed, input_precision=PRECISION) + values * through
        at = (first + rows)[:, None] * (HEADS * DIM) + head * DIM + channels[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=in_rows[:, None] & in_channels[None, :])
        kept = (moved * tl.exp(last - total)[:, None]).to(kind)
        state = state * tl.exp(last) + tl.dot(tl.trans(kept), keys, input_precision=PRECISION)
    tl.store(state_out + tile, state, mask=in_tile)


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] as it lies where heads stand side by side and rows one stride apart, else a copy."""
    together = x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if together else x.contiguous()


@without_wgmma()
def triton_mamba2(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `naive_mamba2`, without a gradient; x, b and c share a dtype and may be columns of one
    matrix."""
    if not x.dtype == b.dtype == c.dtype:
        raise TypeError(f"x, b and c must share a dtype, not {x.dtype}, {b.dtype} and {c.dtype}")
    batch, tokens, heads, dim = x.shape
    groups, size = b.shape[2:]
    x, b, c = (_rows(part) for part in (x, b, c))
    dt, decay = (part.float().contiguous() for part in (dt, decay))
    out = torch.empty(batch, tokens, heads, dim, device=x.device, dtype=x.dtype)
    state_out = torch.empty(batch, heads, dim, size, device=x.device, dtype=torch.float32)
    wide = x.dtype == torch.float32 or size > 128
    block = max(16, min(BLOCK_P, triton.next_power_of_2(dim)))
    mamba2_scan_kernel[(triton.cdiv(dim, block), batch * heads)](
        x, x.stride(1), dt, decay, b, b.stride(1), c, c.stride(1), dt if skip is None else skip.float(),
        state_out if state is None else state.contiguous(), state_out, out, tokens,
        HEADS=heads, GROUPS=groups, DIM=dim, STATE=size, CHUNK=CHUNK, BLOCK_P=block,
        BLOCK_N=max(16, triton.next_power_of_2(size)), INITIAL=state is not None, SKIP=skip is not None,
        STAGES=1 if wide else 2, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        num_warps=8 if wide else 4,
    )  # fmt: skip
    return out, state_out
