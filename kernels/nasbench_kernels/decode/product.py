"""A product and its SwiGLU for a few to a hundred sequences in one launch: y = SiLU(x Wg^T) * (x Wu^T).

The weights are the rows of a program's tile, so that each is read once whatever the batch, and the sequences its
columns: cuBLAS writes gate and up for a second kernel to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.decode.card import card

MOST_SEQUENCES = 128
"""One tile holds them all; beyond, products are bound by arithmetic and cuBLAS is the faster."""


def fits(x: Tensor) -> bool:
    """Whether x [B, K] is better served here than by cuBLAS: few sequences, two bytes an element (tiles of fp32 spill
    their registers)."""
    return x.shape[0] <= MOST_SEQUENCES and x.element_size() == 2


@triton.jit
def swiglu_product_kernel(
    x, weight, out, BATCH, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
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
    """Rows of the weights, sequences and columns of a block; warps and pipeline stages of its program."""

    rows: int
    sequences: int
    columns: int
    warps: int
    stages: int


def product_launch(batch: int, rows: int, element_size: int, sms: int, shared_memory: int) -> ProductLaunch:
    """By measurements on an H100: README.md."""
    sequences = max(16, triton.next_power_of_2(batch))
    columns = 128 // element_size
    block, warps = (128, 8) if sequences > 64 and rows >= 64 * sms else (64, 8 if sequences > 64 else 4)
    room = shared_memory - 4096
    if (2 * block + sequences) * columns * element_size * 3 > room:
        block = 64
    return ProductLaunch(
        block, sequences, columns, warps, max(1, min(4, room // ((2 * block + sequences) * columns * element_size)))
    )


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] contiguous, B at most 128, weight [2 F, K], gate over up -> SiLU(x Wg^T) * (x Wu^T), [B, F]."""
    rows = weight.shape[0] // 2
    out = torch.empty(x.shape[0], rows, device=x.device, dtype=x.dtype)
    launch = product_launch(x.shape[0], rows, x.element_size(), *card(x.device))
    swiglu_product_kernel[(triton.cdiv(rows, launch.rows),)](
        x, weight, out, x.shape[0], COLUMNS=x.shape[1], ROWS=rows,
        BLOCK_R=launch.rows, BLOCK_B=launch.sequences, BLOCK_K=launch.columns, STAGES=launch.stages,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=launch.warps,
    )  # fmt: skip
    return out
