"""The most likely token of each row of logits: parts of a row at once, then a reduction over the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.pdl import pdl_launch, wait

PART = 4096
"""Logits of a program."""


@triton.jit
def argmax_parts_kernel(
    logits, values, indices, row_stride, SIZE, PARTS, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    wait(PDL)
    value = tl.load(logits + row * row_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.max(value, 0)
    # The first of equals, as torch takes it; a row of NaN must still name a token.
    first = tl.min(tl.where((value == highest) & inside, at, SIZE - 1), 0)
    tl.store(values + row * PARTS + part, highest)
    tl.store(indices + row * PARTS + part, first)


@triton.jit
def argmax_reduce_kernel(values, indices, out, PARTS, SIZE, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    inside = parts < PARTS
    wait(PDL)
    value = tl.load(values + row * PARTS + parts, mask=inside, other=float("-inf"))
    index = tl.load(indices + row * PARTS + parts, mask=inside, other=SIZE - 1)
    first = tl.min(tl.where(value == tl.max(value, 0), index, SIZE - 1), 0)
    tl.store(out + row, first.to(tl.int64))


def argmax(logits: Tensor, part: int = PART) -> Tensor:
    """The index of each row's largest entry, the first of equals: logits [B, V], entries of a row contiguous, no NaN
    -> [B] int64.

    Args:
        part: logits of a program, a power of two.
    """
    batch, size = logits.shape
    parts = triton.cdiv(size, part)
    values = torch.empty(batch, parts, device=logits.device, dtype=torch.float32)
    indices = torch.empty(batch, parts, device=logits.device, dtype=torch.int32)
    out = torch.empty(batch, device=logits.device, dtype=torch.int64)
    argmax_parts_kernel[(parts, batch)](
        logits, values, indices, logits.stride(0), size, parts, BLOCK=part, num_warps=4, **pdl_launch(logits.device)
    )
    argmax_reduce_kernel[(batch,)](
        values, indices, out, parts, size,
        BLOCK=triton.next_power_of_2(parts), num_warps=1, **pdl_launch(logits.device),
    )  # fmt: skip
    return out
