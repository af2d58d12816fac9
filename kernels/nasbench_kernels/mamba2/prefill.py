"""The recurrence of Mamba2 over a sequence in Triton, forward and backward. README.md derives the equations.

    scores   every chunk and group at once: c_i . b_j, which the heads of a group share
    scan     chunk by chunk, a program per tile of channels of a head: state in registers, outputs
    unscan   chunk by chunk backwards: gradients of states
    collect  every chunk and head at once: gradients of x, dt, decay, b, c and skip

States stay in registers in fp32; operands of matrix products are in the inputs' dtype and accumulate in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nasbench_kernels.gated_delta.prefill import without_wgmma
from nasbench_kernels.mamba2.prefill_kernels import (
    mamba2_collect_kernel,
    mamba2_scan_kernel,
    mamba2_scores_kernel,
    mamba2_unscan_kernel,
)

CHUNK, BLOCK_P = 64, 32
COLLECT_P = 16
"""Channels at once in `collect`, which keeps three sums of a chunk in registers."""
FP32_CHUNK, FP32_BLOCK_P = 32, 16
"""Of fp32 inputs, whose products are three of tf32: larger tiles take thousands of bytes of stack."""


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] as it lies where heads stand side by side and rows one stride apart, else a copy."""
    together = x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if together else x.contiguous()


def _constants(x: Tensor, b: Tensor) -> dict[str, Any]:
    """What every kernel but the first takes."""
    (heads, dim), (groups, size), exact = x.shape[2:], b.shape[2:], x.dtype == torch.float32
    chunk, block = (FP32_CHUNK, FP32_BLOCK_P) if exact else (CHUNK, BLOCK_P)
    return {
        "HEADS": heads, "GROUPS": groups, "DIM": dim, "STATE": size, "CHUNK": chunk,
        "BLOCK_P": max(16, min(block, triton.next_power_of_2(dim))), "BLOCK_N": max(16, triton.next_power_of_2(size)),
        "PRECISION": "tf32x3" if exact else "tf32", "num_warps": 8 if exact or size > 64 else 4,
    }  # fmt: skip


class _ChunkedMamba2(torch.autograd.Function):
    @staticmethod
    @without_wgmma()
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = dt.dtype, decay.dtype
        x, b, c = (_rows(part) for part in (x, b, c))
        dt, decay = (part.float().contiguous() for part in (dt, decay))
        batch, tokens, heads, dim = x.shape
        groups, size = b.shape[2:]
        sizes, keep = _constants(x, b), any(ctx.needs_input_grad)
        chunk, block = sizes["CHUNK"], sizes["BLOCK_P"]
        count = triton.cdiv(tokens, chunk)
        scores = torch.empty(batch, tokens, groups, chunk, device=x.device, dtype=x.dtype)
        mamba2_scores_kernel[(count, batch * groups)](
            b, b.stride(1), c, c.stride(1), scores, tokens,
            **{key: sizes[key] for key in ("GROUPS", "STATE", "CHUNK", "BLOCK_N", "PRECISION")}, num_warps=4,
        )  # fmt: skip
        out = torch.empty(batch, tokens, heads, dim, device=x.device, dtype=x.dtype)
        state_out = torch.empty(batch, heads, dim, size, device=x.device, dtype=torch.float32)
        states = torch.empty(batch, heads, count, dim, size, device=x.device, dtype=x.dtype) if keep else out
        factor = dt if skip is None else skip.float()
        mamba2_scan_kernel[(triton.cdiv(dim, block), batch * heads)](
            x, x.stride(1), dt, decay, b, b.stride(1), c, c.stride(1), scores, factor,
            state_out if state is None else state.contiguous(), state_out, states, out, tokens,
            **sizes, INITIAL=state is not None, SKIP=skip is not None, KEEP=keep,
            STAGES=1 if x.dtype == torch.float32 or size > 128 else 2,
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(x, dt, decay, b, c, factor, scores, states)
            ctx.skip, ctx.state = None if skip is None else skip.dtype, None if state is None else state.dtype
        return out, state_out

    @staticmethod
    @without_wgmma()
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, decay, b, c, factor, scores, states = ctx.saved_tensors
        dout, dstate_out = gradients[0].to(x.dtype).contiguous(), gradients[1].contiguous()
        batch, tokens, heads, dim = x.shape
        groups, size = b.shape[2:]
        sizes = _constants(x, b)
        dstate_in, dstates = torch.empty_like(dstate_out), torch.empty_like(states)
        mamba2_unscan_kernel[(triton.cdiv(dim, sizes["BLOCK_P"]), batch * heads)](
            decay, c, c.stride(1), dout, dstate_out, dstate_in, dstates, tokens, **sizes,
            STAGES=1 if x.dtype == torch.float32 or size > 128 else 2,
        )  # fmt: skip
        dx, ddt, ddecay, dskip = torch.empty_like(dout), *(torch.empty_like(dt) for _ in range(3))
        # Of each head; a group's are summed below.
        db, dc = (torch.empty(batch, tokens, heads, size, device=x.device, dtype=b.dtype) for _ in range(2))
        mamba2_collect_kernel[(triton.cdiv(tokens, sizes["CHUNK"]), batch * heads)](
            x, x.stride(1), dt, decay, b, b.stride(1), c, c.stride(1), scores, factor, states, dstates, dout,
            dx, ddt, ddecay, db, dc, dskip, tokens,
            **sizes | {"num_warps": 8, "BLOCK_P": COLLECT_P}, SKIP=ctx.skip is not None,
        )  # fmt: skip
        if groups < heads:
            db, dc = (part.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32).to(b.dtype) for part in (db, dc))
        return (
            dx, ddt.to(ctx.dtypes[0]), ddecay.to(ctx.dtypes[1]), db, dc,
            None if ctx.skip is None else dskip.sum((0, 1)).to(ctx.skip),
            None if ctx.state is None else dstate_in.to(ctx.state),
        )  # fmt: skip


def triton_mamba2(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `naive_mamba2`, differentiable in all of them.

    x, b and c share a dtype and may be columns of one matrix. N is at most 256, with a gradient at most 128.
    """
    if not x.dtype == b.dtype == c.dtype:
        raise TypeError(f"x, b and c must share a dtype, not {x.dtype}, {b.dtype} and {c.dtype}")
    return _ChunkedMamba2.apply(x, dt, decay, b, c, skip, state)
