"""The recurrence of Mamba2 over a prompt in Triton. README.md derives the equations.

    scores   every chunk and group at once: c_i . b_j, which the heads of a group share
    scan     chunk by chunk, a program per tile of channels of a head: state in registers, outputs

States stay in registers in fp32; operands of matrix products are in the inputs' dtype and accumulate in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.gated_delta.kernel import without_wgmma
from nasbench_kernels.gated_delta.tile import decays, matrix

CHUNK, BLOCK_P = 64, 32
FP32_CHUNK, FP32_BLOCK_P = 32, 16
"""Of fp32 inputs, whose products are three of tf32: larger tiles take thousands of bytes of stack."""


@triton.jit
def mamba2_scores_kernel(
    b, b_stride, c, c_stride, scores, T,
    GROUPS: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // GROUPS).to(tl.int64)
    group = tl.program_id(1) % GROUPS
    rows = tl.arange(0, CHUNK)
    lanes = tl.arange(0, BLOCK_N)
    start = tl.program_id(0) * CHUNK
    in_rows = start + rows < T
    first = sequence * T + start
    keys = matrix(b + first * b_stride + group * STATE, rows, lanes, b_stride, in_rows, lanes < STATE)
    queries = matrix(c + first * c_stride + group * STATE, rows, lanes, c_stride, in_rows, lanes < STATE)
    score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    at = ((first + rows) * GROUPS + group)[:, None] * CHUNK + rows[None, :]
    tl.store(scores + at, score.to(scores.dtype.element_ty), mask=in_rows[:, None])


@triton.jit
def mamba2_scan_kernel(
    x, x_stride, dt, decay, b, b_stride, c, c_stride, scores, skip, state_in, state_out, out, T,
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
    tile = (sequence * HEADS + head) * DIM * STATE + channels[None, :] * STATE + lanes[:, None]
    in_tile = in_lanes[:, None] & in_channels[None, :]
    # Turned, [N, P]: the longer side as rows of a product takes fewer registers.
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if INITIAL:
        state = tl.load(state_in + tile, mask=in_tile, other=0.0).to(tl.float32)
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
        score = matrix(scores + (first * GROUPS + group) * CHUNK, rows, rows, GROUPS * CHUNK, in_rows, rows < CHUNK)
        values = matrix(x + first * x_stride + head * DIM, rows, channels, x_stride, in_rows, in_channels)
        # The step size on the scores: values are an operand as they lie.
        score = score.to(tl.float32) * decays(total, rows, in_rows, False) * step[None, :]
        mixed = tl.dot(queries, state.to(kind), input_precision=PRECISION) * tl.exp(total)[:, None]
        mixed = tl.dot(score.to(kind), values, mixed, input_precision=PRECISION)
        if SKIP:
            mixed += values.to(tl.float32) * through
        at = (first + rows)[:, None] * (HEADS * DIM) + head * DIM + channels[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=in_rows[:, None] & in_channels[None, :])
        kept = (keys.to(tl.float32) * (step * tl.exp(last - total))[:, None]).to(kind)
        state = state * tl.exp(last) + tl.dot(tl.trans(kept), values, input_precision=PRECISION)
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
    exact = x.dtype == torch.float32
    chunk, block = (FP32_CHUNK, FP32_BLOCK_P) if exact else (CHUNK, BLOCK_P)
    block = max(16, min(block, triton.next_power_of_2(dim)))
    scores = torch.empty(batch, tokens, groups, chunk, device=x.device, dtype=x.dtype)
    shared = {
        "GROUPS": groups, "STATE": size, "CHUNK": chunk, "BLOCK_N": max(16, triton.next_power_of_2(size)),
        "PRECISION": "tf32x3" if exact else "tf32",
    }  # fmt: skip
    mamba2_scores_kernel[(triton.cdiv(tokens, chunk), batch * groups)](
        b, b.stride(1), c, c.stride(1), scores, tokens, **shared, num_warps=4
    )
    mamba2_scan_kernel[(triton.cdiv(dim, block), batch * heads)](
        x, x.stride(1), dt, decay, b, b.stride(1), c, c.stride(1), scores, dt if skip is None else skip.float(),
        state_out if state is None else state.contiguous(), state_out, out, tokens,
        **shared, HEADS=heads, DIM=dim, BLOCK_P=block, INITIAL=state is not None, SKIP=skip is not None,
        STAGES=1 if exact or size > 128 else 2, num_warps=8 if exact or size > 64 else 4,
    )  # fmt: skip
    return out, state_out
