"""Tiles of rows, the decays between the tokens of a chunk, and activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def matrix(base, rows, columns, stride, in_rows, in_columns):
    return tl.load(
        base + rows[:, None] * stride + columns[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0
    )


@triton.jit
def decays(total, rows, in_rows, STRICT: tl.constexpr):
    """exp(G_i - G_j) of earlier tokens j, zero elsewhere, [C, C]."""
    earlier = (rows[:, None] > rows[None, :]) if STRICT else (rows[:, None] >= rows[None, :])
    earlier = earlier & in_rows[:, None]
    # Masked before the exponential: that of a later token overflows.
    return tl.exp(tl.where(earlier, total[:, None] - total[None, :], float("-inf")))
