"""Skinny products, for 2 to 128 sequences: each weight is read once, whatever the batch.

The rows of a program's tile are rows of the weight, its columns are the sequences. Three forms: y = W x + b; the same
split over the columns of W (split-K), whose partial sums `add_norm` adds to the residual, so that a matrix of few rows
still occupies the whole card; and y = SiLU(x Wg^T) * (x Wu^T), where cuBLAS writes gate and up for a second kernel.

With swap-AB the sequences are the rows of the tile and the weights its columns, which Hopper's matrix instructions take
in any multiple of eight: a program then takes the outputs that make one or two programs for each multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.pdl import prefetch, wait
from nasbench_kernels.common.tile import silu
from nasbench_kernels.linear.launch import GemmLaunch, gemm_choice, swiglu_gemm_choice


@triton.jit
def gemm_kernel(
    x, weight, bias, out, BATCH, ROWS, COLUMNS, SHARE, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    LINE: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    in_rows = rows < ROWS
    sequences = tl.arange(0, BLOCK_M)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    begin = part * SHARE
    weights = weight + rows.to(tl.int64)[:, None] * COLUMNS + (begin + lanes)[None, :]
    inputs = x + sequences[None, :] * x_stride + (begin + lanes)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if BIAS:
        offset = tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)
    if PDL:
        for ahead in tl.static_range(0, PREFETCH * BLOCK_K, LINE):
            column = tl.minimum(begin + ahead, COLUMNS - 1)
            prefetch(weight + tl.minimum(rows, ROWS - 1).to(tl.int64) * COLUMNS + column)
    wait(PDL)
    for first in tl.range(0, SHARE, BLOCK_K, num_stages=STAGES):
        if EVEN:
            value = tl.load(inputs + first, mask=in_batch[None, :], other=0.0)
            block = tl.load(weights + first, mask=in_rows[:, None], other=0.0)
        else:
            inside = begin + first + lanes < COLUMNS
            value = tl.load(inputs + first, mask=inside[:, None] & in_batch[None, :], other=0.0)
            block = tl.load(weights + first, mask=in_rows[:, None] & inside[None, :], other=0.0)
        total = tl.dot(block, value, total, input_precision=PRECISION)
    if BIAS:
        total += offset[:, None]
    at = out + (part * BATCH + sequences)[None, :].to(tl.int64) * ROWS + rows[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_batch[None, :])


@triton.jit
def swiglu_gemm_kernel(
    x, weight, out, BATCH, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    LINE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < ROWS
    sequences = tl.arange(0, BLOCK_M)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    gates = weight + rows.to(tl.int64)[:, None] * COLUMNS + lanes[None, :]
    ups = gates + ROWS * COLUMNS
    inputs = x + sequences[None, :] * COLUMNS + lanes[:, None]
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PDL > 0:
        for ahead in tl.static_range(0, PREFETCH * BLOCK_K, LINE):
            at = weight + tl.minimum(rows, ROWS - 1).to(tl.int64) * COLUMNS + min(ahead, COLUMNS - 1)
            prefetch(at)
            prefetch(at + ROWS * COLUMNS)
    wait(PDL)
    for first in tl.range(0, COLUMNS, BLOCK_K, num_stages=STAGES):
        inside = first + lanes < COLUMNS
        value = tl.load(inputs + first, mask=inside[:, None] & in_batch[None, :], other=0.0)
        both = in_rows[:, None] & inside[None, :]
        block = tl.load(gates + first, mask=both, other=0.0)
        gate = tl.dot(block, value, gate, input_precision=PRECISION)
        block = tl.load(ups + first, mask=both, other=0.0)
        up = tl.dot(block, value, up, input_precision=PRECISION)
    # Rounded as the rows of the plain product are.
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    up = up.to(out.dtype.element_ty).to(tl.float32)
    result = silu(gate) * up
    at = out + sequences[None, :].to(tl.int64) * ROWS + rows[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=in_rows[:, None] & in_batch[None, :])


@triton.jit
def weight_rows(output, ROWS, SWIGLU: tl.constexpr, COUNT: tl.constexpr):
    """The outputs of a block's COUNT columns, from `output` on, and the row of the weight for each. With SWIGLU the
    gate and the up of an output stand side by side; their rows are ROWS apart in memory."""
    lanes = tl.arange(0, COUNT)
    if SWIGLU:
        outputs = output + lanes // 2
        rows = tl.minimum(outputs, ROWS - 1) + lanes % 2 * ROWS
    else:
        outputs = output + lanes
        rows = tl.minimum(outputs, ROWS - 1)
    return outputs, rows.to(tl.int64)


@triton.jit
def store_swap_ab(
    total, bias, out, activated, output, end, activated_at, BATCH, ROWS, BLOCK_M: tl.constexpr, COUNT: tl.constexpr,
    SWIGLU: tl.constexpr, BIAS: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    """Writes the outputs from `output` to `end` of a tile [BLOCK_M, COUNT] of sums, and SiLU of the ACTIVATED outputs
    from `activated_at` on to `activated` [B, ACTIVATED]."""
    sequences = tl.arange(0, BLOCK_M)
    if SWIGLU:
        # Neighbouring columns of a tile of sums are in the same thread: nothing is exchanged.
        gate, up = tl.split(tl.reshape(total, [BLOCK_M, COUNT // 2, 2]))
        outputs = output + tl.arange(0, COUNT // 2)
        # Rounded as the rows of the plain product are.
        gate = gate.to(out.dtype.element_ty).to(tl.float32)
        up = up.to(out.dtype.element_ty).to(tl.float32)
        result = silu(gate) * up
    else:
        outputs = output + tl.arange(0, COUNT)
        result = total
        if BIAS:
            result += tl.load(bias + outputs, mask=outputs < end, other=0.0).to(tl.float32)[None, :]
    at = out + sequences[:, None].to(tl.int64) * ROWS + outputs[None, :]
    wanted = (sequences < BATCH)[:, None] & (outputs < end)[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=wanted)
    if ACTIVATED > 0:
        place = outputs - activated_at
        # Of what was written, rounded.
        result = result.to(out.dtype.element_ty).to(tl.float32)
        tl.store(
            activated + sequences[:, None] * ACTIVATED + place[None, :], silu(result).to(out.dtype.element_ty),
            mask=wanted & ((place >= 0) & (place < ACTIVATED))[None, :],
        )  # fmt: skip


@triton.jit
def swap_ab_gemm_kernel(
    x, weight, bias, out, activated, BATCH, ROWS, COLUMNS, SHARE, OUTPUTS, x_stride, activated_at,
    BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, LINE: tl.constexpr, EVEN: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * OUTPUTS
    end = tl.minimum(begin + OUTPUTS, ROWS)
    part = tl.program_id(1).to(tl.int64)
    start = part * SHARE
    begin2 = begin + (BLOCK_N // 2 if SWIGLU else BLOCK_N)
    sequences = tl.arange(0, BLOCK_M)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    outputs, rows = weight_rows(begin, ROWS, SWIGLU, BLOCK_N)
    in_rows = outputs < end
    weights = weight + rows[None, :] * COLUMNS + (start + lanes)[:, None]
    inputs = x + sequences[:, None] * x_stride + (start + lanes)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2 > 0:
        outputs2, rows2 = weight_rows(begin2, ROWS, SWIGLU, BLOCK_N2)
        in_rows2 = outputs2 < end
        weights2 = weight + rows2[None, :] * COLUMNS + (start + lanes)[:, None]
        total2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    if PDL:
        for ahead in tl.static_range(0, PREFETCH * BLOCK_K, LINE):
            column = tl.minimum(start + ahead, COLUMNS - 1)
            prefetch(weight + rows * COLUMNS + column)
            if BLOCK_N2 > 0:
                prefetch(weight + rows2 * COLUMNS + column)
    wait(PDL)
    for first in tl.range(0, SHARE, BLOCK_K, num_stages=STAGES):
        if EVEN:
            value = tl.load(inputs + first, mask=in_batch[:, None], other=0.0)
            block = tl.load(weights + first, mask=in_rows[None, :], other=0.0)
        else:
            inside = start + first + lanes < COLUMNS
            value = tl.load(inputs + first, mask=in_batch[:, None] & inside[None, :], other=0.0)
            block = tl.load(weights + first, mask=inside[:, None] & in_rows[None, :], other=0.0)
        total = tl.dot(value, block, total, input_precision=PRECISION)
        if BLOCK_N2 > 0:
            if EVEN:
                block = tl.load(weights2 + first, mask=in_rows2[None, :], other=0.0)
            else:
                block = tl.load(weights2 + first, mask=inside[:, None] & in_rows2[None, :], other=0.0)
            total2 = tl.dot(value, block, total2, input_precision=PRECISION)
    out += part * BATCH * ROWS
    store_swap_ab(
        total, bias, out, activated, begin, end, activated_at, BATCH, ROWS, BLOCK_M, BLOCK_N, SWIGLU, BIAS, ACTIVATED
    )  # fmt: skip
    if BLOCK_N2 > 0:
        store_swap_ab(
            total2, bias, out, activated, begin2, end, activated_at, BATCH, ROWS, BLOCK_M, BLOCK_N2, SWIGLU, BIAS,
            ACTIVATED,
        )  # fmt: skip


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None, split_k: bool = False) -> Tensor:
    """y = W x (+ bias): x [B, K] of contiguous rows, B at most 128, weight [N, K] contiguous -> [B, N] in x's dtype.

    Args:
        split_k: return the partial sums of y, which `add_norm` adds up: fp32 [S, B, N], no bias.
    """
    return run_gemm(x, weight, bias, gemm_choice(x, weight, split_k), split_k=split_k)


def gemm_and_silu(x: Tensor, weight: Tensor, bias: Tensor | None, at: int, size: int) -> tuple[Tensor, Tensor | None]:
    """`gemm`, and SiLU of its outputs from `at` to `at + size`, [B, size], where the launch can write both (a swap-AB
    one); else None."""
    launch = gemm_choice(x, weight, False)
    activated = torch.empty(x.shape[0], size, device=x.device, dtype=x.dtype) if launch.swap_ab else None
    return run_gemm(x, weight, bias, launch, activated=activated, activated_at=at), activated


def swiglu_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] contiguous, B at most 128, weight [2 F, K], gate over up -> SiLU(x Wg^T) * (x Wu^T), [B, F]."""
    return run_gemm(x, weight, None, swiglu_gemm_choice(x, weight), swiglu=True)


def run_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, launch: GemmLaunch, *, swiglu: bool = False, split_k: bool = False,
    activated: Tensor | None = None, activated_at: int = 0,
) -> Tensor:  # fmt: skip
    """Any of the above as `launch` says.

    Args:
        activated: [B, M] of x's dtype, into which a swap-AB launch writes SiLU of the outputs from `activated_at` on.
    """
    (batch, columns), rows = x.shape, weight.shape[0] // (2 if swiglu else 1)
    share, each = launch.share(columns), launch.outputs_each(swiglu)
    size, kind = ((launch.split_k, batch, rows), torch.float32) if split_k else ((batch, rows), x.dtype)
    out = torch.empty(size, device=x.device, dtype=kind)
    grid, even, bias_or_x = (triton.cdiv(rows, each), launch.split_k), share * launch.split_k == columns, x
    if bias is not None:
        bias_or_x = bias
    if launch.swap_ab:
        swap_ab_gemm_kernel[grid](
            x, weight, bias_or_x, out, out if activated is None else activated, batch, rows, columns, share, each,
            x.stride(0), activated_at, BLOCK_N2=launch.block_n2, EVEN=even, SWIGLU=swiglu, BIAS=bias is not None,
            ACTIVATED=0 if activated is None else activated.shape[1], **launch.constants(x),
        )  # fmt: skip
    elif swiglu:
        swiglu_gemm_kernel[grid[:1]](x, weight, out, batch, COLUMNS=columns, ROWS=rows, **launch.constants(x))
    else:
        gemm_kernel[grid](
            x, weight, bias_or_x, out, batch, rows, columns, share, x.stride(0), EVEN=even, BIAS=bias is not None,
            **launch.constants(x),
        )  # fmt: skip
    return out
