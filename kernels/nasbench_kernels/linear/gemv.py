"""Matrix-vector products for one sequence. They read the weights once at the memory's speed, and need no launch for
what stands before and after: RMSNorm or SiLU of the input, bias, SwiGLU, residual addition. They load weights one block
ahead, the first block before the launch that makes x is done.

cuBLAS reaches 0.7 to 3 TB/s of an H200's 4.5 at one row.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.launch import launch_for
from nasbench_kernels.common.pdl import pdl_launch, wait
from nasbench_kernels.common.tile import silu

Before = Literal["", "norm", "silu"]


@triton.jit
def gemv_kernel(
    x, weight, bias, norm_weight, out,
    COLUMNS: tl.constexpr, ROWS, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, SWIGLU: tl.constexpr,
    EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < ROWS
    at = weight + rows.to(tl.int64)[:, None] * COLUMNS
    lanes = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    other = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    both = in_rows[:, None] & (lanes < COLUMNS)[None, :]
    next_part = tl.load(at + lanes[None, :], mask=both, other=0.0)
    if SWIGLU:
        next_up = tl.load(at + ROWS * COLUMNS + lanes[None, :], mask=both, other=0.0)
    if NORM:
        next_scale = tl.load(norm_weight + lanes, mask=lanes < COLUMNS, other=0.0)
    if BIAS:
        offset = tl.load(bias + rows, mask=in_rows, other=0.0)
    wait(PDL)
    next_value = tl.load(x + lanes, mask=lanes < COLUMNS, other=0.0)
    if ADD:
        residual = tl.load(out + rows, mask=in_rows, other=0.0)
    for first in range(0, COLUMNS, BLOCK_K):
        part = next_part
        value = next_value.to(tl.float32)
        if SWIGLU:
            up = next_up
        if NORM:
            scale = next_scale.to(tl.float32)
        if COLUMNS > BLOCK_K:
            ahead = first + BLOCK_K + lanes
            inside = ahead < COLUMNS
            both = in_rows[:, None] & inside[None, :]
            next_value = tl.load(x + ahead, mask=inside, other=0.0)
            if NORM:
                next_scale = tl.load(norm_weight + ahead, mask=inside, other=0.0)
            next_part = tl.load(at + ahead[None, :], mask=both, other=0.0)
            if SWIGLU:
                next_up = tl.load(at + ROWS * COLUMNS + ahead[None, :], mask=both, other=0.0)
        if NORM:
            squares += value * value
            value = value * scale
        if SILU:
            value = silu(value)
        total += part.to(tl.float32) * value[None, :]
        if SWIGLU:
            other += up.to(tl.float32) * value[None, :]
    result = tl.sum(total, 1)
    up_result = tl.sum(other, 1)
    if NORM:
        # The norm is one factor for the whole vector, so it may wait for the products.
        factor = tl.rsqrt(tl.sum(squares) / COLUMNS + EPS)
        result = result * factor
        up_result = up_result * factor
    if SWIGLU:
        result = silu(result) * up_result
    if BIAS:
        result += offset.to(tl.float32)
    if ADD:
        result += residual.to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=in_rows)


def gemv_launch(rows: int, columns: int, swiglu: bool) -> tuple[int, int, int]:
    """(rows, columns of a block, warps), by measurements on an H100."""
    if columns <= 512:
        return 16, triton.next_power_of_2(columns), 8
    if swiglu:
        return 4, 512, 8
    if columns > 4096:
        return 2, 2048, 4
    return (4, 512, 4) if rows > 4096 else (2, 1024, 4)


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, before: Before = "", norm_weight: Tensor | None = None,
    eps: float = 0.0, swiglu: bool = False, add_to: Tensor | None = None, launch: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """y = W f(x) (+ bias): x [1, K] contiguous, weight [N, K] contiguous -> [1, N].

    Args:
        before: f: nothing, RMSNorm with `norm_weight` and `eps`, or SiLU.
        swiglu: weight holds gate over up, [2 N, K]; y = SiLU(gate x) * (up x), no bias.
        add_to: [1, N], to which y is added in place; it is what is returned.
        launch: (rows, columns of a block, warps); default: the tuner's or `gemv_launch`'s.
    """
    columns = weight.shape[1]
    rows = weight.shape[0] // (2 if swiglu else 1)
    out = torch.empty(1, rows, device=x.device, dtype=x.dtype) if add_to is None else add_to
    block_n, block_k, warps = launch or launch_for(
        "gemv", "swiglu" * swiglu, (rows, columns), lambda: gemv_launch(rows, columns, swiglu)
    )
    gemv_kernel[(triton.cdiv(rows, block_n),)](
        x, weight, x if bias is None else bias, x if norm_weight is None else norm_weight, out,
        COLUMNS=columns, ROWS=rows, BLOCK_N=block_n, BLOCK_K=block_k,
        NORM=before == "norm", SILU=before == "silu", BIAS=bias is not None, ADD=add_to is not None, SWIGLU=swiglu,
        EPS=eps, num_warps=warps, **pdl_launch(x.device),
    )  # fmt: skip
    return out
