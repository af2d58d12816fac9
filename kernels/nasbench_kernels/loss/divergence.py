"""KL(teacher || student) of rows of logits, its gradient in the student's place. README.md counts the bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
NOTHING = tl.constexpr(-1e30)
"""A logit beyond the row's end: finite, so that differences are, too."""


@triton.jit
def divergence_kernel(student, teacher, kl, lse, V, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """One row: sums relative to the running maxima first, the gradient in a second pass."""
    index = tl.program_id(0)
    student += index.to(tl.int64) * V
    teacher += index.to(tl.int64) * V
    lanes = tl.arange(0, BLOCK)
    most_s = float("-inf")
    most_t = float("-inf")
    sum_s = 0.0
    sum_t = 0.0
    cross = 0.0  # of exp(t - most_t) (t - s)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        s = tl.load(student + start + lanes, mask=inside, other=NOTHING).to(tl.float32)
        t = tl.load(teacher + start + lanes, mask=inside, other=NOTHING).to(tl.float32)
        new_s = tl.maximum(most_s, tl.max(s, 0))
        new_t = tl.maximum(most_t, tl.max(t, 0))
        weight = tl.exp(t - new_t)
        shrink = tl.exp(most_t - new_t)
        sum_s = sum_s * tl.exp(most_s - new_s) + tl.sum(tl.exp(s - new_s), 0)
        sum_t = sum_t * shrink + tl.sum(weight, 0)
        cross = cross * shrink + tl.sum(weight * (t - s), 0)
        most_s = new_s
        most_t = new_t
    whole_s = most_s + tl.log(sum_s)
    whole_t = most_t + tl.log(sum_t)
    tl.store(kl + index, cross / sum_t - whole_t + whole_s)
    tl.store(lse + index, whole_s)
    if GRADIENT:
        # Backwards: the end of the row was read last and is still in the cache.
        for back in range(tl.cdiv(V, BLOCK)):
            start = (tl.cdiv(V, BLOCK) - 1 - back) * BLOCK
            inside = start + lanes < V
            s = tl.load(student + start + lanes, mask=inside, other=NOTHING).to(tl.float32)
            t = tl.load(teacher + start + lanes, mask=inside, other=NOTHING).to(tl.float32)
            change = tl.exp(s - whole_s) - tl.exp(t - whole_t)
            tl.store(student + start + lanes, change.to(student.dtype.element_ty), mask=inside)


def divergence_rows(student: Tensor, teacher: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of every row and log sum exp of the student's logits, [N] fp32 each.

    Args:
        student, teacher: logits [N, V], contiguous.
        gradient: the student's logits are replaced by the gradient of the KL's sum by them.
    """
    rows, vocabulary = student.shape
    kl, lse = (torch.empty(rows, device=student.device, dtype=torch.float32) for _ in range(2))
    divergence_kernel[(rows,)](
        student, teacher, kl, lse, vocabulary,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)), GRADIENT=gradient, num_warps=WARPS,
    )  # fmt: skip
    return kl, lse
