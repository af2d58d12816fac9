"""A skinny product whose rows read one of several inputs: products that stand side by side in one launch.

As the swap-AB form of `gemm`: the sequences are the rows of a tile, the weights its columns, and each weight is read
once for up to 128 sequences.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.launch import sm_limits
from nasbench_kernels.common.pdl import pdl_launch, prefetch, wait

LINE_BYTES = 128


@triton.jit
def grouped_gemm_kernel(
    x, weight, bias, out, tiles, BATCH, ROWS, x_stride, group_stride, bias_from,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, LINE: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    group = tl.load(tiles + 3 * tl.program_id(0)).to(tl.int64)
    begin = tl.load(tiles + 3 * tl.program_id(0) + 1)
    end = tl.load(tiles + 3 * tl.program_id(0) + 2)
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
    rows = begin + tl.arange(0, BLOCK_N)
    in_rows = rows < end
    sequences = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    weights = weight + tl.minimum(rows, ROWS - 1).to(tl.int64)[None, :] * COLUMNS + lanes[:, None]
    inputs = x + group * group_stride + sequences[:, None].to(tl.int64) * x_stride + lanes[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BIAS:
        offset = tl.load(bias + rows - bias_from, mask=in_rows & (rows >= bias_from), other=0.0).to(tl.float32)
    if PDL:
        for ahead in tl.static_range(0, PREFETCH * BLOCK_K, LINE):
            column = min(ahead, COLUMNS - 1)
            prefetch(weight + tl.minimum(rows, ROWS - 1).to(tl.int64) * COLUMNS + column)
    wait(PDL)
    for first in tl.range(0, COLUMNS, BLOCK_K, num_stages=STAGES):
        if COLUMNS % BLOCK_K == 0:
            value = tl.load(inputs + first, mask=in_batch[:, None], other=0.0)
            block = tl.load(weights + first, mask=in_rows[None, :], other=0.0)
        else:
            inside = first + lanes < COLUMNS
            value = tl.load(inputs + first, mask=in_batch[:, None] & inside[None, :], other=0.0)
            block = tl.load(weights + first, mask=inside[:, None] & in_rows[None, :], other=0.0)
        total = tl.dot(value, block, total, input_precision=PRECISION)
    if BIAS:
        total += offset[None, :]
    at = out + sequences[:, None].to(tl.int64) * ROWS + rows[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=in_batch[:, None] & in_rows[None, :])


@cache
def _tiles(sizes: tuple[int, ...], block_n: int, device: torch.device) -> Tensor:
    """Group, first row and end of the group of every tile, int32 [tiles, 3]."""
    found, begin = [], 0
    for group, size in enumerate(sizes):
        found += [(group, row, begin + size) for row in range(begin, begin + size, block_n)]
        begin += size
    with torch.inference_mode(False):
        return torch.tensor(found, dtype=torch.int32).to(device)


def grouped_gemm(
    x: Tensor, group_stride: int, weight: Tensor, sizes: tuple[int, ...], bias: Tensor | None = None
) -> Tensor:
    """Products of several inputs by one matrix each, the matrices one over the other.

    Args:
        x: [B, K] with contiguous columns, the first group's input; group i's begins `group_stride` * i elements later.
        weight: [N, K] contiguous.
        sizes: rows of the weight for each group; their sum is N.
        bias: of the last rows.

    Returns:
        [B, N] in x's dtype.
    """
    (batch, columns), rows, exact = x.shape, len(weight), x.dtype == torch.float32
    sms, shared_memory = sm_limits(x.device)
    block_m = max(16, min(128, triton.next_power_of_2(batch)))
    # Narrow tiles where wide ones would leave multiprocessors without work.
    block_n = (128 if batch > 128 else 64) if rows >= 40 * sms else (64 if batch > 128 else 32)
    if exact:
        block_m, block_n = min(block_m, 32), 32
    line = LINE_BYTES // x.element_size()
    block_k = 2 * line if batch <= 64 and columns >= 16 * line and not exact else line
    tile = (block_n + block_m) * block_k * x.element_size()
    stages = max(1, min(4 if block_k > line else 6, triton.cdiv(columns, block_k), (shared_memory - 2048) // tile))
    tiles = _tiles(sizes, block_n, x.device)
    out = torch.empty(batch, rows, device=x.device, dtype=x.dtype)
    grouped_gemm_kernel[(len(tiles), triton.cdiv(batch, block_m))](
        x, weight, weight if bias is None else bias, out, tiles, batch, rows, x.stride(0), group_stride,
        0 if bias is None else rows - len(bias), COLUMNS=columns, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k,
        STAGES=stages, PREFETCH=min(2 if block_k > line else 4, stages), LINE=line,
        ALIGNED=all(size % 16 == 0 for size in sizes), BIAS=bias is not None, PRECISION="ieee" if exact else "tf32",
        num_warps=8 if block_m * block_n >= 1 << 13 else 4, **pdl_launch(x.device),
    )  # fmt: skip
    return out
