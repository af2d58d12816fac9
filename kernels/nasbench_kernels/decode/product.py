"""Products for a few to a hundred sequences: each weight is read once, whatever the batch.

The weights are the rows of a program's tile and the sequences its columns. Three forms: y = W x + b; the same divided
over the columns of W, whose parts `add_norm` sums while it adds the residual, so that a matrix of few rows still
occupies the whole card; and y = SiLU(x Wg^T) * (x Wu^T), where cuBLAS writes gate and up for a second kernel to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.decode.card import card
from nasbench_kernels.decode.overlap import dependent, fetch, follow

MOST_SEQUENCES = 128
"""One tile holds them all; beyond, products are bound by arithmetic and cuBLAS is the faster."""


def fits(x: Tensor) -> bool:
    """Whether x [B, K] is better served here than by cuBLAS: few sequences, two bytes an element (tiles of fp32 spill
    their registers)."""
    return 2 <= x.shape[0] <= MOST_SEQUENCES and x.element_size() == 2


@triton.jit
def batch_product_kernel(
    x, weight, bias, out, BATCH, ROWS, COLUMNS, SHARE, x_stride,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    in_rows = rows < ROWS
    sequences = tl.arange(0, BLOCK_B)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    begin = part * SHARE
    weights = weight + rows.to(tl.int64)[:, None] * COLUMNS + (begin + lanes)[None, :]
    inputs = x + sequences[None, :] * x_stride + (begin + lanes)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    if BIAS:
        offset = tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)
    if PDL:
        for ahead in tl.static_range(EARLY):
            column = tl.minimum(begin + ahead * BLOCK_K, COLUMNS - 1)
            fetch(weight + tl.minimum(rows, ROWS - 1).to(tl.int64) * COLUMNS + column)
    follow(PDL)
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
def swiglu_product_kernel(
    x, weight, out, BATCH, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < ROWS
    sequences = tl.arange(0, BLOCK_B)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    gates = weight + rows.to(tl.int64)[:, None] * COLUMNS + lanes[None, :]
    ups = gates + ROWS * COLUMNS
    inputs = x + sequences[None, :] * COLUMNS + lanes[:, None]
    gate = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    up = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    if PDL > 0:
        for ahead in tl.static_range(EARLY):
            at = weight + tl.minimum(rows, ROWS - 1).to(tl.int64) * COLUMNS + min(ahead * BLOCK_K, COLUMNS - 1)
            fetch(at)
            fetch(at + ROWS * COLUMNS)
    follow(PDL)
    for first in tl.range(0, COLUMNS, BLOCK_K, num_stages=STAGES):
        inside = first + lanes < COLUMNS
        value = tl.load(inputs + first, mask=inside[:, None] & in_batch[None, :], other=0.0)
        both = in_rows[:, None] & inside[None, :]
        gate = tl.dot(tl.load(gates + first, mask=both, other=0.0), value, gate, input_precision=PRECISION)
        up = tl.dot(tl.load(ups + first, mask=both, other=0.0), value, up, input_precision=PRECISION)
    # Rounded as the rows of the plain product are.
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    up = up.to(out.dtype.element_ty).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    at = out + sequences[None, :].to(tl.int64) * ROWS + rows[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=in_rows[:, None] & in_batch[None, :])


@dataclass(frozen=True)
class ProductLaunch:
    """Rows of the weights, sequences and columns of a block; warps and pipeline stages of its program; parts that the
    columns are divided into; blocks of weights that are asked for before the launch ahead is done. A block's row is one
    line of the cache, 128 bytes."""

    rows: int
    sequences: int
    columns: int
    warps: int
    stages: int
    parts: int = 1
    early: int = 0

    def share(self, columns: int) -> int:
        """Columns of a part, whole blocks."""
        return triton.cdiv(triton.cdiv(columns, self.parts), self.columns) * self.columns


def product_launch(batch: int, element_size: int, shared_memory: int) -> ProductLaunch:
    """Of gate and up product with SwiGLU, by measurements on an H100: `benchmarks/launches.py`."""
    sequences = max(16, triton.next_power_of_2(batch))
    block_k = 128 // element_size
    stages, warps = (4, 4) if sequences <= 32 else (3, 4) if sequences <= 64 else (3, 8)
    tile = (2 * 64 + sequences) * block_k * element_size
    stages = max(1, min(stages, (shared_memory - 4096) // tile))
    return ProductLaunch(64, sequences, block_k, warps, stages, early=stages if sequences == 64 else 0)


def batch_launch(
    batch: int, rows: int, columns: int, element_size: int, sms: int, shared_memory: int, divided: bool
) -> ProductLaunch:
    """Of a plain product, or of one that may be divided: into one program for each multiprocessor, two where there are
    many columns, but parts of twelve blocks at least. By measurements on an H100: `benchmarks/launches.py`."""
    sequences = max(16, triton.next_power_of_2(batch))
    block_k, block = 128 // element_size, 64
    blocks, tiles = triton.cdiv(columns, block_k), triton.cdiv(rows, block)
    long = blocks >= 100
    parts = max(1, min((2 if long else 1) * sms // tiles, blocks // 12)) if divided else 1
    share = triton.cdiv(blocks, parts)
    tile = (block + sequences) * block_k * element_size
    stages = max(1, min(4 if divided else 5, (shared_memory // 2 - 4096) // tile))
    # Where two programs share a multiprocessor, one's loop hides the other's start.
    early = 0 if (divided and long) or blocks < 8 else stages
    return ProductLaunch(block, sequences, block_k, 4, stages, triton.cdiv(blocks, share), early)


def streams(x: Tensor, weight: Tensor, divided: bool = False) -> bool:
    """Whether W x, or with `divided` what add_norm is to sum, is faster here than by cuBLAS: up to 64 sequences, and
    beyond where the rows that a program multiplies are short. By measurements on an H100: `benchmarks/launches.py`.

    Args:
        x: [B, K].
        weight: [N, K].
    """
    rows, columns = weight.shape
    short = columns < 3 * rows if divided else columns <= 512
    return fits(x) and (x.shape[0] <= 64 or short)


def batch_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, divided: bool = False) -> Tensor:
    """y = W x (+ bias): x [B, K] of contiguous rows, B at most 128, weight [N, K] contiguous -> [B, N] in x's dtype.

    Args:
        divided: y as the sum of parts, which is `add_norm`'s to form: fp32 [S, B, N], no bias.
    """
    (batch, columns), rows = x.shape, weight.shape[0]
    launch = batch_launch(batch, rows, columns, x.element_size(), *card(x.device), divided)
    return launch_batch_product(x, weight, bias, divided, launch)


def launch_batch_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, divided: bool, launch: ProductLaunch
) -> Tensor:
    """`batch_product` as `launch` says."""
    (batch, columns), rows = x.shape, weight.shape[0]
    size, kind = ((launch.parts, batch, rows), torch.float32) if divided else ((batch, rows), x.dtype)
    out = torch.empty(size, device=x.device, dtype=kind)
    share = launch.share(columns)
    batch_product_kernel[(triton.cdiv(rows, launch.rows), launch.parts)](
        x, weight, x if bias is None else bias, out, batch, rows, columns, share, x.stride(0),
        BLOCK_R=launch.rows, BLOCK_B=launch.sequences, BLOCK_K=launch.columns, STAGES=launch.stages,
        EARLY=launch.early, EVEN=share * launch.parts == columns, BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=launch.warps, **dependent(x.device),
    )  # fmt: skip
    return out


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] contiguous, B at most 128, weight [2 F, K], gate over up -> SiLU(x Wg^T) * (x Wu^T), [B, F]."""
    launch = product_launch(x.shape[0], x.element_size(), card(x.device)[1])
    return launch_swiglu_product(x, weight, launch)


def launch_swiglu_product(x: Tensor, weight: Tensor, launch: ProductLaunch) -> Tensor:
    """`swiglu_product` as `launch` says."""
    rows = weight.shape[0] // 2
    out = torch.empty(x.shape[0], rows, device=x.device, dtype=x.dtype)
    swiglu_product_kernel[(triton.cdiv(rows, launch.rows),)](
        x, weight, out, x.shape[0], COLUMNS=x.shape[1], ROWS=rows,
        BLOCK_R=launch.rows, BLOCK_B=launch.sequences, BLOCK_K=launch.columns, STAGES=launch.stages,
        EARLY=launch.early, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=launch.warps, **dependent(x.device),
    )  # fmt: skip
    return out
